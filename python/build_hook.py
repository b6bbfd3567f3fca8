"""What hatchling calls to put the library into the wheel.

cargo builds it, unless PFC_LIBRARY in the environment names a libpartialfc.so that was built elsewhere. With
PFC_GLIBC=2.28 cargo-zigbuild builds it instead, for systems with that glibc or a later one. The wheel serves every
Python 3 of its platform, because the package has no extension module.
"""

import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SONAME = "libpartialfc.so.0"


class Hook(BuildHookInterface):
    def dependencies(self):
        """What pip installs before it builds."""
        return ["cargo-zigbuild>=0.20", "ziglang"] if glibc() and self.target_name == "wheel" else []

    def initialize(self, version, build_data):
        if self.target_name != "wheel" or version == "editable":
            return
        root = pathlib.Path(self.root)
        self.made = pathlib.Path(tempfile.mkdtemp(prefix="partialfc-wheel-"))
        library = self.made / SONAME
        shutil.copyfile(os.environ.get("PFC_LIBRARY") or built(root), library)
        strip(library)
        into = {library: f"lib/{SONAME}"}
        # A wheel holds no links: this text, which linkers read, is what `-lpartialfc` finds.
        into[self.write("libpartialfc.so", f"INPUT({SONAME})\n")] = "lib/libpartialfc.so"
        for header in (root / "include").glob("*.h*"):
            into[header] = f"include/{header.name}"
        for template, folder in (
            ("partialfc.pc", "pkgconfig"),
            ("partialfcConfig.cmake", "cmake/partialfc"),
            ("partialfcConfigVersion.cmake", "cmake/partialfc"),
        ):
            # As the Makefile fills them.
            text = (root / "packaging" / f"{template}.in").read_text(encoding="utf-8")
            for name, value in (
                ("PREFIX_FROM_PC", "../.."),
                ("INCLUDE_FROM_LIB", "../include"),
                ("VERSION", self.metadata.version),
                ("SONAME", SONAME),
            ):
                text = text.replace(f"@{name}@", value)
            into[self.write(template, text)] = f"lib/{folder}/{template}"
        for source, path in into.items():
            build_data["force_include"][str(source)] = f"partialfc/{path}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{tag(library)}"

    def finalize(self, version, build_data, artifact_path):
        if made := getattr(self, "made", None):
            shutil.rmtree(made)

    def write(self, name: str, text: str) -> pathlib.Path:
        path = self.made / name
        path.write_text(text, encoding="utf-8")
        return path


def glibc() -> str | None:
    """The oldest that the library shall run with; None: that of this machine."""
    return None if os.environ.get("PFC_LIBRARY") else os.environ.get("PFC_GLIBC")


def built(root: pathlib.Path) -> pathlib.Path:
    """The library, built as `make build` does: it names no folder of this machine."""
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR") or root / "target")
    home = os.environ.get("CARGO_HOME") or pathlib.Path.home() / ".cargo"
    remap = [f"--remap-path-prefix={what}" for what in (f"{root}=partialfc", f"{home}=cargo", f"{target}=target")]
    command, folder, environment = ["cargo", "build"], target / "release", dict(os.environ)
    if oldest := glibc():
        triple = f"{platform.machine()}-unknown-linux-gnu"
        command, folder = ["cargo-zigbuild", "zigbuild", "--target", f"{triple}.{oldest}"], target / triple / "release"
        environment["CARGO_ZIGBUILD_PYTHON_PATH"] = sys.executable  # Which has zig.
    command += ["--release", "--lib", "--locked"]
    if flags := environment.get("RUSTFLAGS"):
        environment["RUSTFLAGS"] = " ".join([flags, *remap])
    else:
        command += ["--config", f"build.rustflags={remap!r}".replace("'", '"')]
    try:
        subprocess.run(command, cwd=root, env=environment, check=True)
    except FileNotFoundError:
        remedy = "pip install cargo-zigbuild ziglang" if oldest else "install Rust"
        raise SystemExit(
            f"partialfc is built by {command[0]}, which is not on PATH: {remedy}, or name a built library in PFC_LIBRARY"
        ) from None
    return root / folder / "libpartialfc.so"


def strip(library: pathlib.Path) -> None:
    """Takes away what no loader reads: two thirds of the file."""
    if tool := shutil.which("strip"):
        subprocess.run([tool, "--strip-unneeded", library], check=True)


def tag(library: pathlib.Path) -> str:
    """The platforms that the library runs on: those with the glibc whose symbols it names."""
    versions = re.findall(rb"GLIBC_2\.(\d+)\0", library.read_bytes())
    return f"manylinux_2_{max(map(int, versions))}_{platform.machine()}"
