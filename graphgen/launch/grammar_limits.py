"""How much a grammar may cost, wherever one is compiled: before a request is taken, and in the worker.

llguidance counts the work of each part of it and gives up at these limits, which bounds its time and memory. Used by
`graphgen.requests.structured` and `graphgen.worker.grammar_compiler`; imports llguidance only when asked.
"""

from typing import Any


def parser_limits() -> Any:  # an LLParserLimits; a Python without llguidance must be able to read this module
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_lexer_states=50_000,
        max_grammar_size=500_000,
        verbose_errors=False,  # what a model writes is nothing for a log
    )
