"""bench/README.md holds what the cases wrote."""

import json
import re
from pathlib import Path

import pytest

from concepts.bench.__main__ import CASES

PACK = Path(__file__).resolve().parents[2]
RESULTS = PACK / "bench" / "results"
PAGE, FIRST = ((PACK / name / "README.md").read_text(encoding="utf-8") for name in ("bench", "."))
NUMBER = re.compile(r"(?<![\w.])\d+(?:,\d{3})*\.\d+")
SECTIONS = {
    part.partition("\n")[0]: part for part in re.split(r"^#{2,} ", PAGE, flags=re.MULTILINE)[1:] if "\n|---" in part
}


def leaves(item):
    if isinstance(item, dict | list):
        for value in item.values() if isinstance(item, dict) else item:
            yield from leaves(value)
    elif isinstance(item, int | float):
        yield abs(float(item))


def written(text: str, values: list[float]) -> bool:
    """Whether the number is one of them, rounded once."""
    number, half = float(text.replace(",", "")), 0.5001 * 10 ** -len(text.partition(".")[2])
    return any(abs(number - value) <= half for value in values)


@pytest.mark.parametrize("title", SECTIONS)
def test_numbers_in_tables_are_those_of_the_results(title):
    section = SECTIONS[title]
    cases = [case for case in CASES if re.search(rf"`(OMP_NUM_THREADS=1 )?(nox -s bench -- )?{case}\b[^`]*`", section)]
    files = [file for case in cases for file in RESULTS.glob(f"{case}*.json")]
    values = [v for file in files for v in leaves(json.loads(file.read_text(encoding="utf-8")))]
    values += [mib / 1024 for mib in values if "GiB" in section]
    tables = re.findall(r"^\|[-|]+\n((?:\|.*\n)+)", section, re.MULTILINE)
    rows = [row for table in tables for row in table.splitlines() if not row.startswith("| goal")]
    missing = [(n, row) for row in rows for n in NUMBER.findall(row.replace("goal", "")) if not written(n, values)]
    assert rows and not missing


def test_every_case_is_on_the_page():
    assert [case for case in CASES if not re.search(rf"`(nox -s bench -- )?{case}\b", PAGE)] == []


def test_numbers_of_the_first_page_are_on_this_one():
    summary = FIRST.partition("## What is measured")[2].partition("## Commands")[0]
    rows = [line for line in summary.splitlines() if line.startswith("| ")]
    values = [float(n.replace(",", "")) for n in NUMBER.findall(PAGE)]
    missing = [(n, row) for row in rows for n in NUMBER.findall(row) if not written(n, values)]
    assert rows and not missing
