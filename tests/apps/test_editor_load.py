"""Many at once: every one gets the answer to his own question, and none waits for ever."""

from concurrent.futures import ThreadPoolExecutor
from time import monotonic

import pytest
from editor_case import TASKS, Task, Visitor, fetched, same

from icd_lightning.editing.prompt_to_prompt import PromptToPrompt

VISITORS = 20


@pytest.mark.slow
def test_twenty_visitors_at_once_get_their_own_pictures(page, pipeline):
    def ask(number: int, task: Task) -> tuple:
        visitor, way = Visitor(page), ("swap", "attention")[number % 2]
        uploaded = visitor.upload(task.picture)
        values = (uploaded, task.source, task.target, way, 3, 1, 0.3, 0.6, "", "")
        first = visitor.call("edit", *values)["data"]
        generated = visitor.call("generate", task.target, 3, 1, 1, number)["data"]
        again = visitor.call("edit", *values)["data"]
        return first, generated, again

    start = monotonic()
    with ThreadPoolExecutor(VISITORS) as pool:
        answers = list(pool.map(ask, range(VISITORS), TASKS))
    print(f"{VISITORS} visitors, {3 * VISITORS} calls: {monotonic() - start:.1f} s")
    for number, (task, (first, generated, again)) in enumerate(zip(TASKS, answers, strict=False)):
        control = PromptToPrompt() if number % 2 else None
        expected = pipeline.edit(*task, control=control).images[0]
        assert same(fetched(first[3]), expected)
        assert same(fetched(again[3]), expected)
        assert same(fetched(first[1]), pipeline.reconstruct(task.picture, task.source).images[0])
        drawn = pipeline.generate(task.target, seed=number).images[0]
        assert same(fetched(generated[1][0]["image"]), drawn)
