"""A page is written whole or not at all, and of one with figures only what is between its marks changes."""

import pytest

from clora import pages

PAGE = b"# Caf\xc3\xa9\r\n\r\nbefore \xff\r\n<!-- figures -->\r\nold\r\n<!-- end of figures -->\r\nafter, no newline"


def test_only_what_is_between_the_marks_changes(tmp_path):
    file = tmp_path / "page.md"
    file.write_bytes(PAGE)
    for figures in ("one\n", "two é\n\n"):
        pages.write_figures(file, figures)
        before, rest = file.read_bytes().split(pages.BEGIN)
        between, after = rest.split(pages.END)
        assert before == PAGE.split(pages.BEGIN)[0]
        assert after == PAGE.split(pages.END)[1]
        assert between.decode().strip() == figures.strip()
    pages.write_figures(tmp_path / "new.md", "three")
    assert (tmp_path / "new.md").read_text() == "<!-- figures -->\n\nthree\n\n<!-- end of figures -->\n"


@pytest.mark.parametrize("text", [b"", b"<!-- figures -->", PAGE + PAGE, b"<!-- end of figures --><!-- figures -->"])
def test_a_page_without_its_marks_stays_as_it_is(tmp_path, text):
    file = tmp_path / "page.md"
    file.write_bytes(text)
    with pytest.raises(ValueError, match="once each"):
        pages.write_figures(file, "figures")
    assert file.read_bytes() == text


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "page.md"
    file.write_bytes(PAGE)

    def full(_):
        raise OSError("no space left on device")

    monkeypatch.setattr(pages.os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        pages.write_figures(file, "figures")
    assert file.read_bytes() == PAGE
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]


def test_a_file_that_is_replaced_keeps_its_mode(tmp_path):
    file = tmp_path / "new" / "file"
    pages.write(file, b"one")
    assert file.stat().st_mode & 0o777 == 0o644
    file.chmod(0o600)
    pages.write(file, b"two")
    assert (file.read_bytes(), file.stat().st_mode & 0o777) == (b"two", 0o600)
