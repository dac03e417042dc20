"""A corpus of some 230 KB for tokenizers, the same on every machine and Python: a seed, and the snippets below."""

# ruff: noqa: RUF001 - characters that look like others are what this corpus is for.

from __future__ import annotations

import random
from collections.abc import Iterator

CHUNK_SIZE = 240

_WORDS = """
the of and a to in he have it that for they with as not on she at by this we you do but from or which one
would all will there say who make when can more if no man out other so what time up go about than into could
state only new year some take come these know see use get like then first any work now may such give over
think most even find day also after way many must look before great back through long where much should well
people down own just because good each those feel seem how high too place little world very still nation hand
old life tell write become here show house both between need mean call develop under last right move thing
general school never same another begin while number part turn real leave might want point form off child few
small since against ask late home interest large person end open public follow during present without again
hold govern around possible head consider word program problem however lead system set order eye plan run keep
face fact group play stand increase early course change help line tokenizer compile matrix naïve café résumé
Zürich façade jalapeño coöperate smörgåsbord
""".split()  # noqa: SIM905 - one word a line would fill the page.
_CONTRACTIONS = [
    "I'm",
    "don't",
    "we'll",
    "THEY'RE",
    "it's",
    "I'd",
    "you've",
    "O'Neill",
    "'tis",
    "rock'n'roll",
    "DON'T",
    "’s",
]
_CODE = [
    "def f(x: int) -> int:\n    return x ** 2 + 1\n\n",
    "for (int i = 0; i < n; ++i) {\n\t\tsum += a[i] * b[i];\n\t}\n",
    "if __name__ == '__main__':\n        main(sys.argv[1:])  # run\n",
    "SELECT id, COUNT(*) FROM users WHERE age >= 18 AND name LIKE '%a_b%' GROUP BY id;\n",
    '{"key": [1, 2.5e-3, null], "nested": {"a\\\\b": "\\u00e9"}}\n',
    "const f = async (x) => { await g(`${x}/path?q=1&r=2`); };\n",
    "<div class='row'><a href=\"https://example.org/a-b_c?d=e#f\">link</a></div>\n",
    "\\begin{equation} \\sum_{i=0}^{\\infty} \\frac{x^i}{i!} = e^x \\end{equation}\n",
    "#include <stdio.h>\r\nint main(void) { return 0; }\r\n",
    "x = 0xDEADBEEF; y = 1_000_000; z = 3.14159; w = a[::-1]; v <<= 2; u |= ~t & 0b1010;\n",
    '$ git log --oneline | head -n 5 && echo "$HOME/${USER:-me}" > /dev/null 2>&1\n',
    'let s: &\'static str = r#"raw "quoted" text"#; // comment\n',
    "func (r *Reader) Read(p []byte) (n int, err error) {\n\treturn\n}\n",
    "camelCaseWordsAndHTTPServerNames snake_case_words SCREAMING_CASE kebab-case-words\n",
]
_SCRIPTS = [
    "今天天气很好，我们去公园散步吧。人工智能正在改变世界！",
    "日本語のテキストには、ひらがな、カタカナ、漢字が混ざっています。",
    "한국어 문장은 이렇게 생겼습니다. 안녕하세요 여러분!",
    "مرحبا بالعالم، هذا نص عربي مع تَشْكِيل وأرقام ١٢٣٤٥.",
    "שלום עולם, זה טקסט בעברית עם ניקוד: שָׁלוֹם.",
    "नमस्ते दुनिया, यह हिन्दी में लिखा है। १२३",
    "สวัสดีชาวโลก นี่คือข้อความภาษาไทย",
    "Привет, мир! Это русский текст, ёлки-палки. ЗАГЛАВНЫЕ буквы.",
    "Γειά σου Κόσμε, ΑΒΓ αβγ ᾳ ῶ.",
    "Tiếng Việt có nhiều dấu: ắ ằ ẳ ẵ ặ, Đường phố Hà Nội.",
    "বাংলা ভাষা সুন্দর। தமிழ் மொழி. తెలుగు భాష.",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝒮𝒸𝓇𝒾𝓅𝓉 ＦＵＬＬ ｗｉｄｔｈ ①②③ Ⅷ ½ ¾ x² H₂O",
]
_EMOJI = ["😀", "👍🏽", "👨‍👩‍👧‍👦", "🏳️‍🌈", "🇫🇷", "❤️", "🤷🏻‍♀️", "1️⃣", "🧑‍💻", "🫠", "☃", "🏴󠁧󠁢󠁥󠁮󠁧󠁿"]
_MARKS = [
    "e\u0301",
    "a\u0308\u0304",
    "n\u0303",
    "Z\u0351\u036b\u0343",
    "\u0915\u094d\u0937",
    "o\u0302\u0323",
    "\u200d",
    "\u00ad",
    "\ufeff",
]
_SPACES = [
    " ",
    "  ",
    "   ",
    "    ",
    "\t",
    "\t\t",
    "\n",
    "\n\n",
    "\n\n\n",
    "\r\n",
    "\r\n\r\n",
    " \n ",
    "\u00a0",
    "\u2003",
    "\u3000",
    "\x0b",
    "\x0c",
    "\x85",
    "\u2028",
]
_SPECIAL = [
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|im_start|>user\n",
    "<repo_name>",
    "<|im_end",
    "<s>",
    "</s>",
    "<unk>",
    "<0x0A>",
    "<|eot_id|>",
]
_PUNCTUATION = [
    *"!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~",
    "...",
    "---",
    "===",
    "???!",
    "——",
    "“",
    "”",
    "…",
    "、",
    "€",
    "→",
    "≠",
    "�",
]


def chunks(size: int = 230_000, seed: int = 20) -> list[str]:
    """The corpus as texts of some 240 characters each, cut wherever that falls; `size` is in bytes of UTF-8."""
    # Only `random.random` is promised to give the same numbers in every Python version.
    source = random.Random(seed)
    text = ""
    made: list[str] = []
    total = 0
    for piece in _pieces(source):
        text += piece
        while len(text) >= CHUNK_SIZE:
            made.append(text[:CHUNK_SIZE])
            total += len(text[:CHUNK_SIZE].encode())
            text = text[CHUNK_SIZE:]
        if total >= size:
            return made
    raise AssertionError("the pieces never end")


def _pieces(source: random.Random) -> Iterator[str]:
    def pick(options: list[str]) -> str:
        return options[int(source.random() * len(options))]

    def several(options: list[str], most: int, between: str = "") -> str:
        return between.join(pick(options) for _ in range(1 + int(source.random() * most)))

    while True:
        kind = int(source.random() * 14)
        if kind < 4:
            sentence = several(_WORDS, 14, " ")
            yield sentence.capitalize() + pick([". ", ", ", "; ", "! ", "? ", ".\n", ": ", " "])
        elif kind == 4:
            yield several(_CONTRACTIONS, 4, " ") + " "
        elif kind == 5:
            yield pick(_CODE)
        elif kind == 6:
            yield pick(_SCRIPTS) + pick(_SPACES)
        elif kind == 7:
            yield several(_EMOJI, 5)
        elif kind == 8:
            yield several(_SPACES, 6)
        elif kind == 9:
            yield str(int(source.random() * 10 ** int(1 + source.random() * 12))) + pick(["", " ", ".5", "%", ",000"])
        elif kind == 10:
            yield several(_PUNCTUATION, 6)
        elif kind == 11:
            yield several(_SPECIAL, 3, pick(["", " "]))
        elif kind == 12:
            yield several(_MARKS, 5) + pick(_WORDS)
        else:
            yield "".join(_code_point(source) for _ in range(int(source.random() * 12)))


def _code_point(source: random.Random) -> str:
    highest = (0x100, 0x800, 0x10000, 0x110000)[int(source.random() * 4)]
    point = int(source.random() * highest)
    return " " if 0xD800 <= point < 0xE000 or point == 0 else chr(point)
