"""Small tokenizers of every decoding kind. Used by the tests of text and chats."""

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE, WordPiece

from graphgen import demo
from graphgen.requests.tokenizer import Tokenizer as GraphgenTokenizer
from graphgen.requests.tokenizer import TokenizerData
from graphgen.requests.tokenizer_files import load_tokenizer

WORDS = ("a", "b", "Hello", "the", "▁", "▁Hello", "▁the", "▁a", "é", "▁😀", "!", ".", "\ufffd", "▁▁")


def byte_level() -> GraphgenTokenizer:
    """The demo model's: every token is a string of bytes, so that an emoji may lie in four tokens."""
    tokenizer = load_tokenizer(demo.model_folder())
    assert tokenizer is not None
    return tokenizer


def sentencepiece_style() -> GraphgenTokenizer:
    """As Llama 2's: ▁ is a space, the first one is dropped, unknown characters are byte tokens."""
    vocab = {token: number for number, token in enumerate(("<unk>", "<s>", "</s>"))}
    for token in (*(f"<0x{byte:02X}>" for byte in range(256)), *WORDS):
        vocab[token] = len(vocab)
    backend = Tokenizer(BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _wrap(backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def metaspace_style() -> GraphgenTokenizer:
    """As T5's and XLNet's: ▁ is a space, the first one is dropped, no byte tokens."""
    vocab = {token: number for number, token in enumerate(("<unk>", "<s>", "</s>", *WORDS))}
    backend = Tokenizer(BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.decoder = decoders.Metaspace()
    return _wrap(backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def word_piece_style() -> GraphgenTokenizer:
    """As BERT's: a space before each token but those that go on with ##."""
    tokens = ("[UNK]", "[CLS]", "the", "hell", "##o", "##s", "a", ".", ",", "n", "'", "##t", "é")
    backend = Tokenizer(WordPiece(vocab={token: number for number, token in enumerate(tokens)}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    return _wrap(backend, unk_token="[UNK]", cls_token="[CLS]")


def _wrap(backend: Tokenizer, **special: str) -> GraphgenTokenizer:
    backend.add_special_tokens([AddedToken(token, special=True) for token in special.values()])
    return GraphgenTokenizer.of(TokenizerData(backend.to_str(), special))


def backend_of(tokenizer: GraphgenTokenizer) -> Any:  # tokenizers publishes no types
    """What the package tokenizers makes of the same data."""
    return Tokenizer.from_str(tokenizer.data.backend)


ALL = {
    "byte_level": byte_level,
    "sentencepiece": sentencepiece_style,
    "metaspace": metaspace_style,
    "word_piece": word_piece_style,
}
