"""Strings on which two implementations of a text metric are likely to disagree.

Seeded and made from scratch: no person's text. Used by dump.py (the committed
reference) and check.py (fresh strings against the built gen-eval).
"""
import random

WORDS = """the a cat sat on mat quick brown fox jumps over lazy dog and then we go home to see
what is new in town today because rain fell all night long it's don't e-mail co-op state-of-the-art
Tea TEA tEa Größe naïve café Ελλάς ΟΔΟΣ \u0130stanbul \u212aelvin \u017fharp straße résumé""".split()
ODD = [
    "3.5%", "1,000", "1,000.50", "5-3", "2021-2022", ".5", "5.", ",,", "...", "a.b.c", "U.S.A.", "9,", ",9", "x,9y", "9.x",
    "&quot;hi&quot;", "&amp;", "&amp;lt;", "&lt;b&gt;", "&#39;", "&", "<skipped>", "<b>", "-\n", "-", "--", "—", "’", "“ok”", "«si»",
    "(hi)", "[x]", "{y}", "~", "`", "^", "_a_", "$5", "#tag", "@name", "a/b", "50/50", "?!", "!!!", "it’s", "'quoted'", "\"q\"",
    "😀", "😂😂😂", "👩‍👩‍👧", "👍🏽", "🇫🇷", "❤️", "e\u0301", "\u200b", "\u200d", "\ufeff",
    "日本語", "中文。", "，", "한국어", "مرحبا", "שלום", "ไทย", "हिन्दी", "１２３", "٣", "Ⅷ", "ﬁ", "𝒜",
    "\t", "\r", "\r\n", "\n", "\n\n", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x1f", "\x85", "\u00a0", "\u2009", "\u2028", "\u2029", "\u202f", "\u3000", "\u180e",
]
FIXED = [
    ("", ""), ("", "a reply"), ("a reply", ""), (" ", " "), ("\n", "\n"), ("\u2028", "x"), ("the cat", "the cat"), ("the", "the"), ("😀", "😀"),
    ("a b c d", "a b c d"), ("a b c", "a b c"), ("the the the the the", "the cat"), ("the cat", "the the the the the"), ("THE CAT", "the cat"),
    ("a b c d e f g", "d e f g a b c"), ("one two\nthree four\nfive", "three four\none two\nsix five"), ("b a\na b", "a b a\nb"),
    ("costs 3.5% more, maybe 1,000.", "costs 3.5 % more , maybe 1,000 ."), ("well-\nknown", "wellknown"), ("(hi)", "(hi )"), ("&amp;quot;", "\""),
    ("\x1ca\x1db\x1ec\x1fd", "a b c d"), ("\u212a", "k"), ("\u0130", "i"), ("x" * 400, "x" * 300), ("word " * 120, "word " * 90 + "other " * 30),
]


def text(rng, longest=24):
    out = []
    for _ in range(rng.randint(0, rng.choice((3, 8, 16, longest)))):
        out.append(rng.choice(WORDS) if rng.random() < 0.7 else rng.choice(ODD))
        out.append(rng.choice(("", " ", " ", " ", " ", " ", "  ", "\n", rng.choice(ODD))))
    return "".join(out)


def mutate(rng, source):
    """Something with a good part in common with `source`, cut between characters."""
    chars = list(source)
    for _ in range(rng.randint(0, 4)):
        at = rng.randint(0, len(chars))
        to = min(len(chars), at + rng.randint(0, 12))
        piece = chars[at:to]
        if rng.random() < 0.5:
            chars[at:to] = list(text(rng, 6))
        else:
            del chars[at:to]
            back = rng.randint(0, len(chars))
            chars[back:back] = piece
    return "".join(chars)


def cases(n, seed):
    """`n` (prediction, reference) pairs: the fixed ones first, then random ones."""
    rng = random.Random(seed)
    pairs = list(FIXED)
    while len(pairs) < n:
        reference = text(rng)
        pairs.append((mutate(rng, reference) if rng.random() < 0.8 else text(rng), reference))
    return pairs[:n]
