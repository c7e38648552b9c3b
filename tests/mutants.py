#!/usr/bin/env python3
"""mutants.py COUNT SEED [-j JOBS] -- draws COUNT small edits of the book's chapters and says which of them the tests notice.

    python3 tests/mutants.py 200 1 -j 16        the long form: about 30 processor seconds for each that is killed
    python3 tests/mutants.py 12 7               another sample
    python3 tests/mutants.py 1 1 --only 'LINE:OLD -> NEW'   one again, as the table prints it

One edit each: an operator, a constant, a condition turned round, or a statement left out, in code of chapters 2 to 17. The
library is compiled in plain C, with assertions off; the tests are those in C that take seconds, each linked with it, and
parity on the golden files: first those that killed a mutant near by, then the quickest. A mutant is killed by the first
that fails, crashes, or takes ten times as long. Those that cannot be told from the original by any result stand in
tests/mutants.txt, one by one with the reason, and are not counted. Fails when less than 95 % of the others are killed.
build/mutants has the table; survivors come last."""
import argparse
import concurrent.futures
import os
import random
import re
import shutil
import subprocess
import sys
import time

OUT = "build/mutants"
LEAST = 95.0
FLAGS = ["gcc", "-std=c99", "-O1", "-w", "-DNDEBUG", "-D_POSIX_C_SOURCE=200809L"]
INCLUDE = ["-I.", "-Iexamples", "-Itests"]
# Slow, or about other files.
SLOW = {"test_kernels", "test_same_bits", "test_svg", "test_ops_table", "test_json", "test_stack", "test_threads",
        "test_safetensors"}
GENERATE = ["2", "4", "5", "7", "8", "9", "10", "11", "12", "13", "14", "15", "16", "17", "18", "19", "21", "22",
            "23", "24", "25"]
SWAPS = [(r" < ", " <= "), (r" <= ", " < "), (r" > ", " >= "), (r" >= ", " > "), (r" == ", " != "), (r" != ", " == "),
         (r" && ", " || "), (r" \|\| ", " && "), (r" \+ ", " - "), (r" - ", " + "), (r" \* (?=[a-zA-Z0-9(])", " / "),
         (r" / ", " * "), (r" % ", " / "), (r" \+= ", " -= "), (r" -= ", " += "),
         (r" \*= ", " /= "), (r" >> ", " << "), (r" << ", " >> "), (r" \| ", " & "), (r" & (?=[a-zA-Z0-9(])", " | ")]
DELETED = re.compile(r"^( +)([a-zA-Z_][\w>.\[\]*+ -]*( [-+*/|&^]?= |\().*);$")
DECLARED = re.compile(r"^ +(const|static)\b|^ +(size_t|float|double|int|int32_t|int64_t|uint\w+|unsigned|void|char|return|"
                      r"dsv3_\w+|dsv3i_\w+) +[*\w]+( =|,|;|\[|\()|^ +(return|break|continue|case|default|DSV3_ASSERT|for|while)\b")


def code_of(lines):
    """The lines with comments and strings blanked, column for column."""
    out, inside = [], False
    for line in lines:
        at, made = 0, ""
        while at < len(line):
            if inside:
                end = line.find("*/", at)
                stop = len(line) if end < 0 else end + 2
                inside = end < 0
            else:
                m = re.compile(r'/\*|"([^"\\]|\\.)*"|\'([^\'\\]|\\.)*\'').match(line, at)
                if m is None:
                    made += line[at]
                    at += 1
                    continue
                if m.group() == "/*":
                    inside = True
                    made += "  "
                    at += 2
                    continue
                stop = m.end()
            made += " " * (stop - at)
            at = stop
        out.append(made)
    return out


def candidates(lines):
    """(line, column, old, new), all of them, in order. Only in functions: preprocessor lines and declarations stay."""
    heads = [(i, m.group(1)) for i, m in ((i, re.match(r" \* Chapter (\w+) +>>", line)) for i, line in enumerate(lines)) if m]
    first = next(i for i, n in heads if n == "2")
    last = next(i for i, n in heads if n.isalpha())
    code, found, depth, macro = code_of(lines), [], 0, False
    for i in range(first, last):
        line = code[i]
        if macro or line.startswith("#"):
            macro = line.endswith("\\")
            continue
        body = depth > 0
        depth += line.count("{") - line.count("}")
        if line.startswith("}") or (line[:1] not in (" ", "}", "") and line.rstrip().endswith("}")):
            depth = 0
        one = re.match(r"^(static|DSV3_API|DSV3I_APART).*\{ .*\}\s*$", line)  # a function in a line
        begin = line.index("{") if one else 0
        if not (body or one) or "DSV3_ASSERT" in line:
            continue
        for pattern, new in SWAPS:
            for m in re.finditer(pattern, line[begin:]):
                found.append((i, begin + m.start(), m.group(), new))
        for m in re.finditer(r"(?<![\w.\"])(\d+)(u?)(?![\w.])", line[begin:]):
            found.append((i, begin + m.start(), m.group(), str(int(m.group(1)) + 1) + m.group(2)))
        for m in re.finditer(r"(?<![\w.])(\d+\.\d*(e[-+]?\d+)?)(f?)(?![\w.])", line[begin:]):
            new = "%g" % (float(m.group(1)) * 1.5 if float(m.group(1)) else 1.0)
            found.append((i, begin + m.start(), m.group(), (new if "." in new or "e" in new else new + ".0") + m.group(3)))
        m = re.search(r"\bif \((.*)\) ", line)
        if m and m.group(1).count("(") == m.group(1).count(")"):
            found.append((i, m.start(1), lines[i][m.start(1):m.end(1)], "!(" + lines[i][m.start(1):m.end(1)] + ")"))
        m = DELETED.match(line.rstrip())
        if m and not DECLARED.match(line) and line.count("(") == line.count(")"):
            found.append((i, m.start(2), lines[i].rstrip()[m.start(2):len(line.rstrip())], ";"))
    return found


def run(command, seconds=600.0, **more):
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                              timeout=seconds, **more)
        return done.returncode, done.stdout.decode("utf-8", "replace")
    except subprocess.TimeoutExpired:
        return "time", ""


def demand(command):
    status, text = run(command)
    if status != 0:
        sys.exit("%s\n%s" % (" ".join(command), text))


def inside(header, to):
    """Both forms of tests/inside.awk."""
    os.makedirs(to + "/body", exist_ok=True)
    for form, name in ((["-v", "body=1"], "/body/dsv3.h"), ([], "/dsv3.h")):
        with open(to + name, "w") as f:
            subprocess.run(["awk"] + form + ["-f", "tests/inside.awk", header], stdout=f, check=True)


def build(directory, header):
    """The library of a header, or None when it does not compile."""
    inside(header, directory)
    made = [directory + "/library.o", directory + "/numbers.o"]
    for command in (FLAGS + ["-I" + directory + "/body", "-I.", "-c", "tests/library.c", "-o", made[0]],
                    FLAGS + ["-DDSV3_IMPLEMENTATION", "-x", "c", "-c", directory + "/dsv3.h", "-o", made[1]]):
        if run(command)[0] != 0:
            return None
    library = directory + "/libdsv3.a"
    if os.path.exists(library):
        os.remove(library)
    demand(["ar", "rc", library] + made)
    return library


def prepare(jobs, chosen):
    """Objects of the tests; returns the commands that make their list: (name, object or None, arguments)."""
    shutil.rmtree(OUT, ignore_errors=True)
    os.makedirs(OUT)
    inside("dsv3.h", OUT + "/inside")
    tests, compile_ = [], []
    for name in sorted(os.listdir("tests")) + ["parity.c"]:
        if not re.match(r"test_\w+\.c$|parity\.c$", name) or name[:-2] in SLOW or (name, None) in compile_:
            continue
        name = name[:-2]
        if chosen is not None and name not in chosen:
            continue
        if name == "test_gradients":
            tests.append((name, None, []))
            continue
        made = "%s/%s.o" % (OUT, name)
        command = FLAGS + ["-I" + OUT + "/inside"] + INCLUDE + ["-c", "tests/%s.c" % name, "-o", made]
        if command not in compile_:
            compile_.append(command)
            if name == "parity":
                tests += [("parity " + g, made, ["tests/golden/" + g]) for g in sorted(os.listdir("tests/golden"))
                          if os.path.exists("tests/golden/%s/golden.safetensors" % g)]
            elif name == "test_generate":
                tests += [("%s %s" % (name, i), made, [i]) for i in GENERATE]
            else:
                tests.append((name, made, []))
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        list(pool.map(demand, compile_))
    return tests


def link(test, directory, library):
    program = "%s/%s" % (directory, test[0].split()[0])
    if test[1] is not None and not os.path.exists(program):
        demand(["gcc", test[1], library, "-o", program, "-lm", "-lpthread"])
    return program


def attempt(test, directory, header, library, seconds):
    """Status of one test with a library: 0, or why it is not."""
    name, made, arguments = test
    program = link(test, directory, library)
    if made is None:
        os.makedirs(directory + "/whole", exist_ok=True)
        shutil.copy(header, directory + "/whole/dsv3.h")
        command = FLAGS + ["-I" + directory + "/whole"] + INCLUDE + ["tests/%s.c" % name, "-o", program, "-lm", "-lpthread"]
        if run(command)[0] != 0:
            return "compile"
    return run([program] + arguments, seconds)[0]


def baseline(tests, jobs):
    """Seconds of each test with the header as it is, which must pass; the quickest first."""
    library, took = build(OUT + "/original", "dsv3.h"), {}
    for test in tests:
        link(test, OUT + "/original", library)

    def one(test):
        begin = time.time()
        status = attempt(test, OUT + "/original", "dsv3.h", library, 600)
        took[test[0]] = time.time() - begin
        return test[0], status
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for name, status in pool.map(one, tests):
            if status != 0:
                sys.exit("%s fails on the header as it is: %s" % (name, status))
    return sorted(tests, key=lambda t: (t[1] is None, took[t[0]])), took


def describe(lines, m):
    i, at, old, new = m
    return "%d:%s -> %s" % (i + 1, old.strip(), new.strip())


def nearest(tests, line, kills):
    """The tests that killed a mutant within 200 lines come first; else as they are, the quickest first."""
    near = {name for i, name in kills if abs(i - line) <= 200}
    return sorted(tests, key=lambda t: t[0] not in near)


def try_one(number, m, lines, tests, took, kills):
    """(what killed it, or None; whether it compiles)."""
    directory = "%s/%d" % (OUT, number)
    os.makedirs(directory)
    i, at, old, new = m
    changed = list(lines)
    changed[i] = lines[i][:at] + new + lines[i][at + len(old):]
    header = directory + "/mutant.h"
    with open(header, "w") as f:
        f.write("\n".join(changed))
    library, killer = build(directory, header), None
    if library is not None:
        for test in nearest(tests, i, kills):
            status = attempt(test, directory, header, library, 30 + 10 * took[test[0]])
            if status != 0:
                kills.append((i, test[0]))
                killer = "%s (%s)" % (test[0], status)
                break
    shutil.rmtree(directory)
    return killer, library is not None


def main():
    p = argparse.ArgumentParser()
    p.add_argument("count", type=int)
    p.add_argument("seed", type=int)
    p.add_argument("-j", type=int, default=os.cpu_count() or 1)
    p.add_argument("--only")
    p.add_argument("--tests", help="these alone, with commas: a quick look at a chapter, not a figure")
    a = p.parse_args()
    with open("dsv3.h") as f:
        lines = f.read().split("\n")
    all_ = candidates(lines)
    drawn = [m for m in all_ if describe(lines, m) == a.only] if a.only else random.Random(a.seed).sample(all_, len(all_))
    equal = set()
    if os.path.exists("tests/mutants.txt"):
        with open("tests/mutants.txt") as f:
            equal = {line.rstrip("\n") for line in f if line.strip() and not line.startswith(("#", " "))}
    tests, took = baseline(prepare(a.j, a.tests.split(",") if a.tests else None), a.j)
    print("%d candidates; tests: %s" % (len(all_), ", ".join("%s %.1f s" % (t[0], took[t[0]]) for t in tests)), flush=True)
    killed, survivors, equivalent, count = 0, [], 0, 0
    table = open(OUT + "/table", "w")
    pending, at, kills = {}, 0, []
    with concurrent.futures.ThreadPoolExecutor(a.j) as pool:
        while True:
            while len(pending) + count < a.count and at < len(drawn):
                pending[pool.submit(try_one, at, drawn[at], lines, tests, took, kills)] = drawn[at]
                at += 1
            if not pending:
                break
            for done in concurrent.futures.wait(pending, return_when=concurrent.futures.FIRST_COMPLETED)[0]:
                m = pending.pop(done)
                killer, compiles = done.result()
                if not compiles:
                    continue  # another is drawn
                count += 1
                code = lines[m[0]].strip()
                listed = "%s -> %s: %s" % (m[2].strip(), m[3].strip(), code) in equal
                equivalent += listed and killer is None
                killed += killer is not None
                row = "%-24s %s: %s" % (killer or ("equivalent" if listed else "SURVIVED"), describe(lines, m), code)
                print(row, flush=True)
                table.write(row + "\n")
                if killer is None and not listed:
                    survivors.append(row)
    share = 100.0 * killed / max(1, count - equivalent)
    print("\n".join(survivors))
    print("mutants: %d of %d killed (%.1f %%), %d more are equivalent; seed %d" %
          (killed, count - equivalent, share, equivalent, a.seed))
    return share < LEAST


if __name__ == "__main__":
    sys.exit(main())
