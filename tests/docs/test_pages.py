"""Pages hold together: links lead somewhere, commands in the text exist, and the two READMEs say the same."""

import re
import shlex
import subprocess

import pytest
import typer
from markdown import ROOT, blocks, headings, links, prose, text_of

READMES = ("README.md", "README.zh.md")
PAGES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/*.md", "docs/guide/*.md", "benchmarks/*.md")
    for path in ROOT.glob(pattern)
)


def anchors(page):
    """The anchors that a forge makes of a page's headings."""
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for _, text in headings(page)}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in links(page):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(str(target.resolve().relative_to(ROOT))), link


def test_the_index_has_every_document():
    listed = set(links("docs/README.md"))
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")} - {"README.md"}
    assert pages <= listed


def command_of(program, words):
    """The command that words name, and the words that are left."""
    if program == "wan-loader":
        from wan_loader.cli.app import app
    else:
        from wan_pipeline.commands.app import app
    command = typer.main.get_command(app)
    words = list(words)
    while hasattr(command, "get_command") and words and not words[0].startswith("-"):
        found = command.get_command(None, words[0])
        assert found is not None, f"{program} has no command {words[0]}"
        command = found
        del words[0]
    return command, words


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_the_text_exist(page):
    for code in re.findall(r"`((?:wan-loader|wan-pipeline) [^`]+)`", prose(page)):
        program, *words = shlex.split(code.replace("|", " "))
        command, rest = command_of(program, words)
        known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        known |= {"--help"}
        ours = rest[: rest.index("--")] if "--" in rest else rest
        for word in ours:
            assert not word.startswith("--") or word in known, f"{code}: {word}"


def test_both_readmes_have_the_same_headings_and_code():
    english, chinese = map(headings, READMES)
    assert [level for level, _ in english] == [level for level, _ in chinese]
    # names of programs and of files are the same in both
    assert [text for _, text in english if text in ("wan-loader", "diffusers")] == [
        text for _, text in chinese if text in ("wan-loader", "diffusers")
    ]
    english, chinese = map(blocks, READMES)
    assert [block.language for block in english] == [block.language for block in chinese]
    for one, other in zip(english, chinese, strict=True):
        assert one.without_comments() == other.without_comments(), f"{one} and {other}"


def test_both_readmes_have_the_same_links_and_numbers():
    def without_words(page):
        return [link for link in links(page) if not link.startswith("#") and not link.startswith("README")]

    assert sorted(without_words("README.md")) == sorted(without_words("README.zh.md"))
    english, chinese = (set(re.findall(r"\d+\.\d+", prose(page))) for page in READMES)
    assert english == chinese


def test_readme_is_short():
    assert all(len(text_of(page).splitlines()) <= 250 for page in READMES)


def test_the_scripts_of_the_first_block_are_there():
    block = blocks("README.md")[0]
    assert block.text.splitlines() == ["./scripts/demo", "./scripts/setup-and-test"]
    for line in block.text.splitlines():
        assert (ROOT / line).stat().st_mode & 0o111
        subprocess.run(["bash", "-n", ROOT / line], check=True)
