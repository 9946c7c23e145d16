# SPDX-License-Identifier: Apache-2.0
"""Eight text classification tasks of what apt's lists say of packages: short descriptions, labelled by section and by debtags facets."""
import collections
import hashlib
import subprocess
import sys

import common

NAMES = ["section", "use", "works-with", "role", "implemented-in", "interface", "field", "admin"]
MOST_CLASSES, LEAST_OF_CLASS, MOST_OF_CLASS = 12, 36, 400
# What a value is called in words, where putting spaces for hyphens does not do.
WORDS = {
    "section": {"libs": "shared library", "libdevel": "development files of a library", "doc": "documentation", "utils": "utility",
                "devel": "software development tool", "net": "network program", "admin": "system administration"},
    "role": {"shared-lib": "shared library", "devel-lib": "development files, headers and static library", "app-data": "data of an application",
             "program": "program", "data": "standalone data", "debug-symbols": "debugging symbols"},
    "implemented-in": {"c": "written in C", "c++": "written in C++", "objc": "written in Objective-C", "r": "written in R"},
    "interface": {"commandline": "command line program", "daemon": "daemon, background server", "text-mode": "text mode, ncurses interface",
                  "web": "web interface", "shell": "command shell"},
    "works-with": {"db": "databases", "file": "files", "software:source": "source code", "software:running": "running processes"},
}
SENTENCES = {"section": "{} package", "use": "software for {}", "works-with": "software that works with {}", "role": "{}",
             "implemented-in": "{}", "interface": "{}", "field": "software for {}", "admin": "system administration: {}"}


def packages():
    try:
        text = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        sys.exit("scripts/reproduce: error: apt-cache prints no list of packages: it takes Debian's apt, and its lists ('apt-get update')")
    found = {}
    for paragraph in text.split("\n\n"):
        fields, last = {}, None
        for line in paragraph.split("\n"):
            if line.startswith(" "):
                if last == "Tag":
                    fields[last] += line
                continue
            last, _, value = line.partition(":")
            fields[last] = value.strip()
        description = fields.get("Description-en") or fields.get("Description")
        if description:
            tags = [tag.strip() for tag in fields.get("Tag", "").split(",") if "::" in tag]
            found.setdefault(description, (fields.get("Section", "").split("/")[-1], tags))
    if len(found) < 20000:
        sys.exit(f"scripts/reproduce: error: apt's lists describe {len(found)} packages, of at least 20000 that are needed: 'apt-get update' with "
                 "Debian's main archive in sources.list")
    return found


def order(text):
    return hashlib.sha256(text.encode()).digest()


def words_of(task, value):
    value = WORDS.get(task, {}).get(value, ("written in " if task == "implemented-in" else "") + value.replace("-", " ").replace(":", " "))
    return SENTENCES[task].format(value)


def make():
    """{task: {"labels": [sentence], "train": [[text, label]], "validation": …, "test": …}}; a text is in one split, whatever the task."""
    of_class = {name: collections.defaultdict(list) for name in NAMES}
    for text, (section, tags) in packages().items():
        if section:
            of_class["section"][section].append(text)
        values = collections.defaultdict(list)
        for tag in tags:
            facet, _, value = tag.partition("::")
            values[facet].append(value)
        for name in NAMES[1:]:
            if len(values[name]) == 1 and values[name][0] != "TODO":  # of several values none is the label
                of_class[name][values[name][0]].append(text)
    tasks = {}
    for name in NAMES:
        classes = sorted(of_class[name], key=lambda value: (-len(of_class[name][value]), value))[:MOST_CLASSES]
        classes = [value for value in classes if len(of_class[name][value]) >= LEAST_OF_CLASS]
        task = {"labels": [words_of(name, value) for value in classes], "train": [], "validation": [], "test": []}
        for label, value in enumerate(classes):
            for text in sorted(of_class[name][value], key=order)[:MOST_OF_CLASS]:
                share = order("split of " + text)[0] / 256
                task["test" if share < 0.25 else "validation" if share < 0.35 else "train"].append([text, label])
        for split in ("train", "validation", "test"):
            task[split].sort(key=lambda pair: order("order of " + pair[0]))
        if len(classes) < 2 or not all(task[split] for split in ("train", "validation", "test")):
            sys.exit(f"scripts/reproduce: error: apt's lists have too few packages with {'a section' if name == 'section' else f'the debtags facet {name}'} "
                     f"({len(classes)} classes of {LEAST_OF_CLASS} and more): 'apt-get update' with Debian's main archive in sources.list")
        tasks[name] = task
    return tasks


if __name__ == "__main__":
    for name, task in make().items():
        print(name, len(task["labels"]), *(f"{split} {len(task[split])}" for split in ("train", "validation", "test")))
