// Arrow keys choose. Held keys, and those pressed before the pictures can be seen, do not.
const choices = { ArrowLeft: "left", ArrowRight: "right", ArrowDown: "tie" };
document.addEventListener("keydown", (event) => {
  const button = document.querySelector(`button[value="${choices[event.key]}"]`);
  const seen = [...document.images].every((image) => image.complete);
  if (!button || !seen || event.repeat || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  button.click();
});
