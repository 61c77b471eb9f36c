"""Names as people and programs give them: all of these are legal on a disk."""

ODD_NAMES = (
    "two words", " ends with spaces ", "a#b", "50%", "50%25", "what?", "a:b", "C:", "it's", 'a"b',
    "line\nbreak", "tab\there", "caf\u00e9", "cafe\u0301", "\u5199\u771f", "\U0001f600", "a\u202eb",
    "\x1b]0;title\x07", "\x1b[31mred", "back\\slash", "a&b=c", "a+b", "[1-3]", "{a,b}", "*", "-f",
    "--output", "~", "$HOME", "007", "1e3", "null", "no", "0x1f", "2024-04-12", "a,b", "a|b", "<a>",
)  # fmt: skip
