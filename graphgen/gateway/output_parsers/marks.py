"""From the text of an output and the places of its special tokens to text in which each of these is a symbol."""

from collections.abc import Mapping, Sequence

from graphgen.calls.outputs import Mark


class MarkedText:
    """The text of one output as it comes."""

    def __init__(self, symbols: Mapping[int, str]) -> None:
        """symbols: of the token ids that have marks."""
        self._symbols = symbols
        self._text = ""  # not given out
        self._start = 0  # its place in the output
        self._marks: list[Mark] = []
        self.texts: dict[int, str] = {}
        """What the tokens that came are in the text, by their symbols' code points: nothing, where the text leaves
        special tokens out."""

    def push(self, text: str, marks: Sequence[Mark]) -> str:
        """More text; marks may be of text that is to come, since text is held back and ids are not."""
        self._text += text
        self._marks += marks
        parts: list[str] = []
        while self._marks and self._marks[0].start <= self._start + len(self._text):
            mark = self._marks[0]
            parts.append(self._take(mark.start - self._start))
            if mark.end > self._start + len(self._text):
                return "".join(parts)
            symbol = self._symbols[mark.token_id]
            self.texts[ord(symbol)] = self._take(mark.end - mark.start)
            parts.append(symbol)
            del self._marks[0]
        parts.append(self._take(len(self._text)))
        return "".join(parts)

    def finish(self) -> str:
        """The text behind a mark whose token did not come whole: a stop string has cut it."""
        return self._take(len(self._text))

    def _take(self, num_characters: int) -> str:
        text, self._text = self._text[:num_characters], self._text[num_characters:]
        self._start += num_characters
        return text
