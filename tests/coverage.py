"""coverage.py COUNTS LIST MISSED -- adds up what gcov counted (its JSON, one object a line) for the files of FILES below.

A line that several programs have compiled counts once, with the branches that any of them took. Writes to MISSED each branch
and each line that none took, to MISSED.sums the share of branches by file, and fails when a share is below LEAST, when a
line that gives an error text was not run, or when something in MISSED does not stand in LIST, or the other way round. Of
dsv3.h's lettered chapters, the engine, only the lines count that give errors.

LIST: two lines for each line of code that is missed in part: "file function: the line's code", without blanks around it,
then, indented, the reason. A line of code stands for all its branches, wherever it is in the function."""
import collections
import json
import os
import re
import sys

FILES = ["dsv3.h", "json.h", "safetensors.h", "checkpoint.h"]
LEAST = 98.0


def book(lines):
    """Those of dsv3.h that count: numbers of all lines of chapters 2 to 17, and of the lettered ones' that give errors."""
    heads = [(i, line.split()[2]) for i, line in enumerate(lines, 1) if re.match(r" \* Chapter [0-9A-Z]+ +>>", line)]
    first, letters = next(i for i, n in heads if n == "2"), next(i for i, n in heads if n.isalpha())
    errors = re.compile(r"dsv3i_fail|dsv3i_check_|DSV3I_NEED\(|DSV3_ERR_")
    return {i for i, line in enumerate(lines, 1) if first <= i and (i < letters or errors.search(line))}


def main(counts, listed, missed):
    text = {}
    for name in FILES:
        with open(name if name == "dsv3.h" else "examples/" + name) as f:
            text[name] = f.read().split("\n")
    counted = book(text["dsv3.h"])
    taken = {name: collections.defaultdict(dict) for name in FILES}  # (line, function, branches) -> how often each
    ran = {name: collections.defaultdict(int) for name in FILES}
    where = {name: {} for name in FILES}
    with open(counts) as f:
        for one in f:
            for part in json.loads(one)["files"]:
                name = os.path.basename(part["file"])
                if name not in FILES:
                    continue
                for line in part["lines"]:
                    at = line["line_number"]
                    if name == "dsv3.h" and at not in counted:
                        continue
                    ran[name][at] += line["count"]
                    where[name][at] = line.get("function_name", "")
                    branches = [b["count"] for b in line["branches"]]
                    if branches:
                        before = taken[name][at].setdefault(len(branches), [0] * len(branches))
                        taken[name][at][len(branches)] = [a + b for a, b in zip(before, branches)]
    entries, failed, sums = {}, [], []
    if os.path.exists(listed):
        with open(listed) as f:
            lines = [line.rstrip("\n") for line in f if line.strip() and not line.startswith("#")]
        for entry, reason in zip(lines[::2], lines[1::2]):
            if entry.startswith(" ") or not reason.startswith(" "):
                failed.append("%s: an entry and its reason are wanted, in turn: %s" % (listed, entry))
            entries[entry] = 0
    with open(missed, "w") as out:
        for name in FILES:
            total = got = 0
            for at in sorted(ran[name]):
                for branches in taken[name][at].values():
                    total += len(branches)
                    got += sum(1 for b in branches if b > 0)
                holes = [b for b in taken[name][at].values() if min(b) == 0]
                if not holes and ran[name][at] > 0:
                    continue
                code = text[name][at - 1].strip()
                entry = "%s %s: %s" % (name, where[name][at], code)
                lacks = "not run" if ran[name][at] == 0 else " ".join(
                    "".join("-" if x == 0 else "+" for x in b) for b in holes)
                out.write("%s:%d: %s: %s: %s\n" % (name, at, where[name][at], lacks, code))
                if entry not in entries:
                    failed.append("%s:%d: not in %s (%s): %s" % (name, at, listed, lacks, code))
                else:
                    entries[entry] += 1
            share = 100.0 * got / total if total else 0.0
            sums.append("%s: %d of %d branches, %.2f %%" % (name, got, total, share))
            if share < LEAST:
                failed.append("%s: %.2f %% of its branches are taken, at least %.0f are wanted" % (name, share, LEAST))
    failed += ["reached, though %s lists it: %s" % (listed, e) for e in entries if not entries[e]]
    with open(missed + ".sums", "w") as out:
        out.write("\n".join(sums) + "\n")
    print("\n".join(sums + failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
