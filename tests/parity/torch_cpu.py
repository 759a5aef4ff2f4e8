"""Lets the PyPI wheel of torch run on a machine without CUDA.

The wheel links CUDA libraries that its 3 GB of companion wheels would bring,
though nothing on the CPU calls them. This compiles, for each of those that is
missing, an empty library of the same name whose functions return an error.

    python torch_cpu.py SITE_PACKAGES/torch/lib
"""

import collections
import pathlib
import re
import subprocess
import sys
import tempfile


def readelf(*arguments):
    return subprocess.run(["readelf", "-W", *arguments], capture_output=True, text=True, check=True).stdout


def main(folder):
    present = {path.name for path in folder.iterdir()}
    system = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True).stdout
    needed, versions = set(), collections.defaultdict(set)
    undefined, defined, data = {}, set(), set()
    for library in sorted(folder.glob("*.so*")):
        needed |= set(re.findall(r"NEEDED.*\[(.+?)\]", readelf("-d", library)))
        name = None
        for line in readelf("-V", library).splitlines():
            if match := re.search(r"File: (\S+)", line):
                name = match[1]
            elif match := re.search(r"Name: (\S+)\s+Flags", line):
                versions[name].add(match[1])
        for line in readelf("--dyn-syms", library).splitlines():
            field = line.split()
            if len(field) < 8 or not field[0].endswith(":"):
                continue
            symbol, _, version = field[7].partition("@")
            if field[6] != "UND":
                defined.add(symbol)
            elif field[4] != "WEAK":
                undefined[symbol] = version.lstrip("@")
                if field[3] == "OBJECT":
                    data.add(symbol)
    missing = sorted(n for n in needed - present if n not in system and re.search(r"^lib(cu|nv|nccl)", n))
    home = {version: name for name in missing for version in versions[name]}
    stubs = collections.defaultdict(lambda: collections.defaultdict(list))
    for symbol, version in sorted(undefined.items()):
        if symbol in defined:
            continue
        if version in home:
            stubs[home[version]][version].append(symbol)
        elif not version and re.match(r"(cu|nv|nccl|pnccl|__cuda)", symbol) and missing:
            stubs[missing[0]][""].append(symbol)
    for name in missing:
        source = "".join(
            f"char {symbol}[4096];\n" if symbol in data else f"long {symbol}(void) {{ return 100; }}\n"
            for symbols in stubs[name].values()
            for symbol in symbols
        )
        script = "".join(
            f"{version} {{ global: {' '.join(s + ';' for s in symbols)} }};\n"
            for version, symbols in stubs[name].items()
            if version
        )
        for version in versions[name] - set(stubs[name]):
            script += f"{version} {{ }};\n"
        with tempfile.TemporaryDirectory() as scratch:
            scratch = pathlib.Path(scratch)
            (scratch / "stub.c").write_text(source or "int nothing;\n")
            command = ["gcc", "-shared", "-fPIC", "-w", "-o", folder / name, scratch / "stub.c", f"-Wl,-soname,{name}"]
            if script:
                (scratch / "versions").write_text(script)
                command.append(f"-Wl,--version-script={scratch / 'versions'}")
            subprocess.run(command, check=True)
    print(f"{len(missing)} stand-ins made" + (f": {' '.join(missing)}" if missing else ""))


main(pathlib.Path(sys.argv[1]))
