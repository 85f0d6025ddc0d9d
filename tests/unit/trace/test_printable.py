"""No letter of a file acts in a terminal, and none is lost."""

import json
import sys
import unicodedata

from geomprobe.trace.printable import printable, show


def test_every_letter_that_acts_is_shown_and_no_other_changes():
    for code in range(sys.maxunicode + 1):
        letter = chr(code)
        acts = unicodedata.category(letter) in ("Cc", "Cf", "Zl", "Zp", "Cs")
        assert (printable(letter) != letter) == acts, hex(code)


def test_escapes_read_back_as_json():
    text = "".join(map(chr, range(0xA0)))
    escaped = printable(text.replace('"', "").replace("\\", ""))
    assert json.loads(f'"{escaped}"') == text.replace('"', "").replace("\\", "")
    assert printable(escaped) == escaped


def test_lines_stay_lines_only_where_that_is_asked_for(capsys):
    assert printable("a\nb") == "a\\u000ab"
    show("a\n\x1b[1mb")
    assert capsys.readouterr().out == "a\n\\u001b[1mb\n"
