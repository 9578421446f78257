"""The tokens of one request: its prompt, then the output that has arrived, read as one sequence.

Owns both. Made by `graphgen.scheduler.request`, read by `graphgen.scheduler.page_chain`; `graphgen.scheduler.policy`
adds the tokens that arrive.
"""

from array import array
from collections.abc import Iterable


class Tokens:
    """A packed prompt, of which many wait, and an output that grows by a token in every step.

    The output is a list: appending to one takes a third of the time that appending to an array does.
    """

    __slots__ = ("output", "prompt")

    def __init__(self, prompt: "array[int]", output: Iterable[int] = ()) -> None:
        """output: what another engine has emitted of it."""
        self.prompt = prompt
        self.output = list(output)

    def __len__(self) -> int:
        return len(self.prompt) + len(self.output)

    def part(self, start: int, end: int) -> "array[int]":
        """Tokens [start, end), all of which are known."""
        prompt_len = len(self.prompt)
        found = self.prompt[start:end]
        if end > prompt_len:
            found.fromlist(self.output[max(0, start - prompt_len) : end - prompt_len])
        return found
