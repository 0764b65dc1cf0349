"""The reader of DOTA's label files."""

from common.dota import horizontal_box, read_label_file
from recognition.published import DOTA


def test_label_file_with_windows_line_ends_and_blank_lines(tmp_path):
    (tmp_path / "P.txt").write_bytes(b"\xef\xbb\xbfimagesource:x\r\ngsd:null\r\n\r\n1 2 3.5 2 3.5 4 1 4 ship 1\r\n")
    (found,) = read_label_file(tmp_path / "P.txt", DOTA["classes"])
    assert found.points == ((1, 2), (3.5, 2), (3.5, 4), (1, 4)) and found.difficult
    assert horizontal_box(found.points) == (1, 2, 3.5, 4)
    assert found.name == "ship" and found.where.endswith("P.txt:4")
