"""Analyses the structure of the project from its source text: imports, cycles, closures, public names, sizes, prose.

    python -m tests.structure table [ROOT]       the Markdown table for LOG.md
    python -m tests.structure limits [ROOT]      today's numbers, as the tables of ../test_structure.py
    python -m tests.structure layers [ROOT]      imports that go up or sideways
    python -m tests.structure cycles [ROOT]      import cycles between files
    python -m tests.structure names [ROOT]       public names that are defined more than once
    python -m tests.structure paths [ROOT]       files, functions and modules named in prose that do not exist
    python -m tests.structure words [PATHS…]     banned words, as file:line: phrase; by default of the whole project

Every function takes the root folder of a checkout and does not import its code, so other versions can be measured too.
Files are named by their path from the root, as trainer/loop.py.
Read next: imports.py, documents.py, banned_words.py, ../test_structure.py.
"""
