"""benchmarks/journeys.py: which files, functions and generators of a project are counted."""

from benchmarks.journeys import Journey, measure, print_counts

PROJECT = {
    "script.py": "from readers import rows\nimport settings\nfrom writers import write\n"
    "def main():\n    write(rows('rows.txt'))\n    import late\n    late.after_the_end()\nmain()\n",
    "settings.py": "def default():\n    return 1\nVALUE = default()\nclass Settings:\n    value = default()\n",
    "readers.py": "from text import clean\ndef lines(path):\n    yield from open(path)\n"
    "def rows(path):\n    for line in lines(path):\n        yield clean(line)\n",
    "text.py": "def clean(line):\n    return line.strip()\n",
    "writers.py": "import os\ndef write(rows):\n    found = sorted(rows)\n    save(found)\n"
    "def save(rows):\n    open('part', 'w').writelines(rows)\n    os.replace('part', 'shard')\n",
    "late.py": "def after_the_end():\n    pass\n",
    "rows.txt": "c\nb\na\n",
}


def test_files_are_counted_between_the_two_events_and_imports_are_not(tmp_path, capsys):
    for name, text in PROJECT.items():
        (tmp_path / name).write_text(text)
    journey = Journey("rows -> shard", "open:rows.txt", "rename:shard", "script.py", items=3)
    count = measure(tmp_path, tmp_path, journey)
    assert count.files == ["readers.py", "script.py", "text.py", "writers.py"]
    assert count.per_item == ["readers.py", "text.py"]
    assert (count.functions, count.generators) == (6, 2)  # main, write, rows, lines, clean, save
    print_counts({journey.name: count}, with_files=True)
    assert capsys.readouterr().out.splitlines()[2:6] == [
        "| rows -> shard | 4 | 2 | 6 | 2 |", "", "rows -> shard", "    * readers.py",
    ]  # fmt: skip
