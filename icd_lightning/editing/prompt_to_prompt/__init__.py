"""Prompt-to-Prompt (arXiv:2208.01626): an edit that borrows its attention from the picture it edits.

Source and target are decoded side by side, as one batch [sources, targets] of P pairs from the same noise. In the first
steps the target attends where the source does; later it is free. A local blend takes what lies outside the changed
words' attention from the source, after every step (InfEdit's control, with a third branch between, is in `unified`):

    control = PromptToPromptControl(PromptToPrompt(), sources, targets, noise, tokenizer=tokenizer, num_steps=4)
    x = torch.cat([noise, noise])
    with control.attached(network):
        for t, s in jumps:
            x = control.step(jump(x, t, s))  # bound to the prompts [*sources, *targets]

The last 2 P rows of each batch that the network gets meanwhile are [sources, targets]; rows before them, the
unconditional ones of classifier-free guidance, are left alone. So a guidance embedding takes 2 P rows, classifier-free
guidance 4 P, or 3 P where the sources are unguided, and the control need not be told which. One evaluation is one step.
"""

from icd_lightning.editing.limits import BlendedWords, PromptToPrompt
from icd_lightning.editing.prompt_to_prompt.control import AttentionControl, PairedGuidance, PromptToPromptControl

__all__ = ["AttentionControl", "BlendedWords", "PairedGuidance", "PromptToPrompt", "PromptToPromptControl"]
