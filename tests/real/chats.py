"""Twenty chats as people have them, of 20 to 400 tokens: two languages, code, emoji, numbers, turns, parts of text."""

from typing import Any

Message = dict[str, Any]


def ask(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


CODE = '''def merge(left, right):
    """Two sorted lists become one."""
    out, i, j = [], 0, 0
    while i < len(left) and j < len(right):
        if left[i] <= right[j]:
            out.append(left[i]); i += 1
        else:
            out.append(right[j]); j += 1
    return out + left[i:] + right[j:]
'''
LETTER = (
    "Dear Ms Keller, thank you for the long walk on Sunday. The weather in the valley was better than the forecast had"
    " promised, and the lake was so clear that we could see the stones at the bottom. My daughter still talks about the"
    " two herons. We would like to come again in October, when the larches are yellow, and we would bring our tent, so"
    " that nobody has to move out of a bed for us. Please tell us whether the second weekend suits you. The train"
    " arrives at 9:42, and we can walk from the station. I have also found the book about mosses that you asked for; it"
    " is heavier than I remembered, but it has wonderful drawings. With kind regards from all four of us, Jonas"
)
BRIEF = (
    "Der Zug nach Zürich hatte fast eine Stunde Verspätung, weil zwischen Olten und Aarau ein Baum auf den Gleisen lag."
    " Die Reisenden wurden gebeten, auf Gleis sieben zu warten. Um 17.35 Uhr fuhr endlich ein Ersatzzug, in dem es so"
    " eng war, dass viele stehen mussten. Trotzdem war die Stimmung gut: Ein Mann verteilte Äpfel aus seinem Garten."
)

CHATS: list[list[Message]] = [
    ask("What is the capital of France?"),
    [
        {"role": "system", "content": "You answer in one sentence."},
        {"role": "user", "content": "Why is the sky blue?"},
    ],
    [
        {"role": "user", "content": "My name is Ada."},
        {"role": "assistant", "content": "Nice to meet you, Ada!"},
        {"role": "user", "content": "What is my name?"},
    ],
    ask("  Translate into English: «Guten Morgen, Zürich!» 你好 12345 😀\n"),
    [{"role": "user", "content": [{"type": "text", "text": t} for t in ("Write a Python function", "f.")]}],
    ask("Was ist der Unterschied zwischen einem See und einem Meer?"),
    ask(f"What does this function do?\n\n```python\n{CODE}```"),
    ask(f"Summarise this letter in one sentence.\n\n{LETTER}"),
    ask(f"Fasse den folgenden Text in einem Satz zusammen.\n\n{BRIEF}"),
    ask("Add 17, 25 and 1048576. Show each step."),
    ask("Write a haiku about 🌧️ and ☕."),
    ask("Return a JSON object with the keys name, age and city for Marie, 31, from Lyon."),
    [
        {"role": "system", "content": "Du bist ein höflicher Assistent und antwortest auf Deutsch."},
        {"role": "user", "content": "Wie kocht man Kartoffelsuppe?"},
    ],
    ask("List three differences between TCP and UDP."),
    [
        {"role": "user", "content": "Give me a word that rhymes with time."},
        {"role": "assistant", "content": "Rhyme, lime, climb."},
        {"role": "user", "content": "And one with moon?"},
        {"role": "assistant", "content": "Spoon, June, tune."},
        {"role": "user", "content": "Now make one sentence of two of them."},
    ],
    ask("SELECT name FROM users WHERE id = 7; -- explain this query"),
    ask("I am sad today 😢. My cat 🐈 ran away and it is raining. What should I do?"),
    ask(f"Translate into German:\n\n{LETTER[:420]}"),
    ask(f"Fix the bug, if there is one, and answer with code only:\n\n{CODE}\n\nprint(merge([3, 1], [2]))"),
    ask(f"{LETTER}\n\n{BRIEF}\n\nWhich of the two texts mentions a train, and when does it arrive?"),
]
