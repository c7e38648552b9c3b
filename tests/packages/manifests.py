"""manifests.py DIST VERSION -- the manifests that `make dist` has written: fields that their formats ask for, one version in all
of them, files that are there. Conan's recipe is run with classes that stand for Conan's. Prints one line for each fault."""
import hashlib, json, os, re, sys, types

dist, version = sys.argv[1:3]
library = f"{dist}/dsv3-{version}"
faults = 0


def expect(ok, what):
    global faults
    if not ok:
        faults += 1
        print(what)


def text(path):
    with open(path, encoding="utf-8") as file:
        return file.read()


with open(f"{dist}/dsv3-{version}.tar.gz", "rb") as file:
    archive = file.read()
sha256 = hashlib.sha256(archive).hexdigest()
for folder, _, names in os.walk(dist):
    for name in names:
        if not name.endswith((".gz", ".zip", ".pack", ".in")):
            expect(not re.search(r"@[A-Z]+[0-9]*@", text(os.path.join(folder, name))), f"{folder}/{name}: a variable is left")

m = json.loads(text(f"{dist}/vcpkg/vcpkg.json"))
expect(m["name"] == "dsv3" and m["version"] == version and m["license"] == "MIT" and m["description"], "vcpkg.json")

m = json.loads(text(f"{library}/library.json"))
expect(re.fullmatch("[a-z0-9-]{1,50}", m["name"]) and m["version"] == version and 0 < len(m["description"]) <= 255, "library.json")
expect(all(re.fullmatch("[a-z0-9-]+", k) for k in m["keywords"]), "library.json: keywords")
expect(m["repository"]["type"] == "git" and m["license"] == "MIT", "library.json: repository, license")
paths = [m["build"]["srcDir"] + "/" + m["headers"]] + [e["base"] + "/" + f for e in m["examples"] for f in e["files"]]
expect(all(os.path.isfile(f"{library}/{p}") for p in paths), "library.json: a file is missing")

m = dict(line.split("=", 1) for line in text(f"{library}/library.properties").splitlines())
wanted = "name version author maintainer sentence paragraph category url architectures".split()
expect(all(m.get(k) for k in wanted), "library.properties: a field is missing")
expect(m["version"] == version and m["category"] == "Data Processing", "library.properties: version, category")
expect(all(os.path.isfile(f"{library}/src/{h}") for h in m["includes"].split(",")), "library.properties: includes")

try:
    import yaml
except ImportError:
    print("skipped: idf_component.yml and module.yml need PyYAML", file=sys.stderr)
else:
    m = yaml.safe_load(text(f"{library}/idf_component.yml"))
    expect(m["version"] == version and m["license"] == "MIT" and m["description"] and m["url"], "idf_component.yml")
    expect(re.fullmatch(r">=[0-9.]+", m["dependencies"]["idf"]), "idf_component.yml: dependencies")
    m = yaml.safe_load(text(f"{library}/zephyr/module.yml"))
    expect(m["name"] == "dsv3" and os.path.isfile(f"{library}/{m['build']['kconfig']}"), "module.yml: kconfig")
    expect(os.path.isfile(f"{library}/{m['build']['cmake']}/CMakeLists.txt"), "module.yml: cmake")

try:
    import kconfiglib
except ImportError:
    print("skipped: Kconfig needs kconfiglib", file=sys.stderr)
else:
    k = kconfiglib.Kconfig(f"{library}/zephyr/Kconfig", warn_to_stderr=False)
    expect(not k.warnings and set(k.syms) >= {"DSV3", "DSV3_TRAINING"}, f"Kconfig: {k.warnings}")

# Conan: the recipe's class, its source and what it says of the package.
made = {}


class Anything:
    def __init__(self, *args, **kw):
        self.args = args

    def __getattr__(self, name):
        return lambda *a, **k: made.setdefault(name, (a, k))


class Info(dict):
    def __missing__(self, key):
        self[key] = types.SimpleNamespace(properties={}, libs=[], requires=[], system_libs=[])
        self[key].set_property = self[key].properties.__setitem__
        return self[key]


for name in ("conan", "conan.tools", "conan.tools.cmake", "conan.tools.files"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["conan"].ConanFile = type("ConanFile", (), {})
tools, files = sys.modules["conan.tools.cmake"], sys.modules["conan.tools.files"]
tools.CMake = tools.CMakeToolchain = Anything
tools.cmake_layout = lambda recipe, **kw: made.setdefault("layout", kw)
files.get = lambda recipe, *a, **kw: made.setdefault("get", (a, kw))
files.copy = lambda recipe, *a, **kw: made.setdefault("copy", (a, kw))
files.rmdir = lambda recipe, path: made.setdefault("rmdir", path)
space = {}
exec(compile(text(f"{dist}/conan/conanfile.py"), "conanfile.py", "exec"), space)
recipe = space["Dsv3Conan"]()
expect(recipe.name == "dsv3" and recipe.version == version and recipe.license == "MIT", "conanfile.py")
recipe.settings = types.SimpleNamespace(os="Linux", rm_safe=lambda name: None)
recipe.cpp_info = types.SimpleNamespace(components=Info(), set_property=lambda *a: None)
recipe.source_folder = recipe.package_folder = dist
for step in ("configure", "layout", "source", "generate", "build", "package", "package_info"):
    getattr(recipe, step)()
expect(made["get"][1] == {"sha256": sha256, "strip_root": True}, "conanfile.py: source")
expect(made["get"][0][0].endswith(f"/dsv3-{version}.tar.gz"), "conanfile.py: address")
parts = recipe.cpp_info.components
expect({p.properties["cmake_target_name"] for p in parts.values()} == {"dsv3::dsv3", "dsv3::static"}, "conanfile.py: targets")
expect(all(step in made for step in ("generate", "configure", "build", "install")), "conanfile.py: steps")

m = text(f"{dist}/meson/dsv3.wrap")
expect(f"source_hash = {sha256}\n" in m and f"directory = dsv3-{version}\n" in m, "dsv3.wrap")

import xml.etree.ElementTree as ET
import zipfile

pack = ET.parse(f"{dist}/dsv3.dsv3.pdsc").getroot()
expect(pack.tag == "package" and pack.get("schemaVersion"), "pdsc: package")
for tag in ("vendor", "name", "description", "url", "license", "releases", "components"):
    expect(pack.find(tag) is not None, f"pdsc: {tag}")
expect(pack.find("releases")[0].get("version") == version, "pdsc: version")
component = pack.find("components/component")
expect(all(component.get(a) for a in ("Cclass", "Cgroup", "Cversion")) and component.get("Cversion") == version, "pdsc: component")
expect(pack.find("url").text.endswith("/"), "pdsc: url")
names = zipfile.ZipFile(f"{dist}/{pack.find('vendor').text}.{pack.find('name').text}.{version}.pack").namelist()
for file in [f.get("name") for f in component.find("files")] + [pack.find("license").text, "dsv3.dsv3.pdsc"]:
    expect(any(n == file or file.endswith("/") and n.startswith(file) for n in names), f"pack: {file}")
sys.exit(faults > 0)
