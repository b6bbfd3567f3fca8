"""`python -m partialfc`: the plan, the flags, and programs that are built with them."""

import importlib.metadata
import pathlib
import shutil
import subprocess
import sys

import pytest

import partialfc

C = r"""
#include <partialfc.h>
#include <stdio.h>
int main(void) {
  puts(pfc_build_info());
  return pfc_version() != PFC_VERSION;
}
"""
CMAKE = """
cmake_minimum_required(VERSION 3.16)
project(app C)
find_package(partialfc 0.1 REQUIRED)
if(TARGET partialfc::static)
  message(FATAL_ERROR "a wheel has no static library")
endif()
add_executable(app main.c)
target_link_libraries(app PRIVATE partialfc::partialfc)
"""
PREFIX = pathlib.Path(partialfc.__file__).parent
installed = pytest.mark.skipif(not (PREFIX / "lib").exists(), reason="this package is not installed: it has no library of its own")


def command(*arguments: str, code: int = 0) -> str:
    done = subprocess.run([sys.executable, "-m", "partialfc", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def needs(tool: str):
    if shutil.which(tool) is None:
        pytest.skip(f"there is no {tool}")


def test_plan():
    text = command("plan", "--classes", "10_000_000", "--ranks", "8", "--batch", "128", "--rate", "0.1")
    lines = {line[:27].strip(): line[27:].split() for line in text.splitlines()}
    assert lines["classes on a rank"] == ["1,250,000", "1,250,000", "10,000,000", "10,000,000"]
    assert lines["classes in a step"] == ["1,250,000", "125,000", "10,000,000", "1,000,000"]
    whole, sampled = (
        partialfc.plan(10_000_000, 512, ranks=8, batch=128, sample_rate=rate, placement="sharded") for rate in (1.0, 0.1)
    )
    assert lines["memory of a rank"][:4] == [f"{whole.total_bytes / 1e9:.2f}", "GB", f"{sampled.total_bytes / 1e9:.2f}", "GB"]
    assert lines["traffic of a rank and step"[:27]][:2] == [f"{whole.traffic_bytes / 1e6:.2f}", "MB"]


def test_plan_of_what_fits():
    where = ("plan", "--classes", "10_000_000", "--rate", "0.1", "--dtype", "bf16")
    assert "that fit" not in command(*where)

    def most(*room: str) -> list[int]:
        (line,) = (line for line in command(*where, *room).splitlines() if line.startswith("most classes that fit"))
        return [int(count.replace(",", "")) for count in line.split()[4:]]

    def planned(classes: int, **options) -> partialfc.Plan:
        return partialfc.plan(classes, 512, batch=128, sample_rate=0.1, weight_dtype="bf16", state_dtype="bf16", **options)

    whole, sampled, *replicated = most("--memory", "24GiB")
    assert planned(sampled).total_bytes <= 24 << 30 < planned(sampled + 1).total_bytes
    assert len(replicated) == 2 and whole < sampled
    file = {"residency": "file", "storage_path": "."}
    _, sampled, *_ = most("--residency", "file", "--disk", "1.5TB")
    assert planned(sampled, **file).storage_bytes <= 1.5e12 < planned(sampled + 1, **file).storage_bytes
    _, fewer, *_ = most("--residency", "file", "--disk", "1.5TB", "--memory", "4GB")
    assert planned(fewer, **file).total_bytes <= 4e9 and fewer < sampled, "the rows of a step are in memory"
    assert most("--memory", "1kB") == most("--memory", "0GB") == [0, 0, 0, 0]
    # Where there is more room than classes can be numbered, that is the limit.
    assert most("--memory", "900TB")[0] == 2**32 - 1
    # So it is where the workspace of more has no room within its limit.
    *_, limited, _ = most("--memory", "1TB", "--workspace-limit", "25000000000")
    assert 10_000_000 < limited < 13_000_000
    assert "give --residency file" in command(*where, "--disk", "1TB", code=1)
    assert "'24' is no size" in command(*where, "--memory", "24", code=2)


def test_plan_of_a_gpu():
    where = ("plan", "--classes", "10_000_000", "--ranks", "8", "--rate", "0.1")
    text = command(*where, "--gpu", "80GB")
    lines = {line[:27].strip(): line[27:].split() for line in text.splitlines()}
    on_gpu = partialfc.plan(10_000_000, 512, ranks=8, batch=128, sample_rate=0.1, gpu_memory=80 * 10**9)
    assert lines["memory of a rank"][2:4] == [f"{on_gpu.total_bytes / 1e9:.2f}", "GB"]
    assert on_gpu.total_bytes != partialfc.plan(10_000_000, 512, ranks=8, batch=128, sample_rate=0.1).total_bytes
    most = int(lines["most classes that fit"][1].replace(",", ""))

    def planned(classes: int) -> partialfc.Plan:
        return partialfc.plan(classes, 512, ranks=8, batch=128, sample_rate=0.1, gpu_memory=80 * 10**9)

    assert planned(most).total_bytes <= 80e9 < planned(most + 8).total_bytes
    assert "with --residency host" in command(*where, "--gpu", "80GB", "--memory", "24GiB", code=1)
    assert "residency must be device" in command(*where, "--gpu", "80GB", "--residency", "file", code=1)


def test_plan_of_rows_in_the_hosts_memory():
    where = ("plan", "--classes", "100_000_000", "--rate", "0.01", "--dtype", "bf16", "--residency", "host", "--gpu", "80GB")
    lines = {line[:28].strip(): line[28:].split() for line in command(*where, "--memory", "1TB").splitlines()}
    assert lines["of that in host memory"] == ["204.80", "GB"] * 4
    assert lines["read over the link, at least"][2:4] == ["3.07", "GB"] and lines["written over it, at least"][2:4] == ["2.05", "GB"]

    def planned(classes: int) -> partialfc.Plan:
        options = {"weight_dtype": "bf16", "state_dtype": "bf16", "residency": "host", "gpu_memory": 80 * 10**9}
        return partialfc.plan(classes, 512, batch=128, sample_rate=0.01, **options)

    most = int(lines["most classes that fit"][1].replace(",", ""))
    assert planned(most).host_bytes <= 1e12 < planned(most + 1).host_bytes
    assert planned(most).total_bytes - planned(most).host_bytes < 80e9
    # On a CPU all memory is the host's.
    on_cpu = partialfc.plan(1000, 512, batch=128, residency="host")
    assert on_cpu.host_bytes == on_cpu.total_bytes


def test_plan_of_rows_in_a_file():
    where = ("plan", "--classes", "10_000_000", "--rate", "0.01", "--dtype", "bf16")
    assert "file of a rank" not in command(*where)
    text = command(*where, "--residency", "file")
    read = next(line for line in text.splitlines() if line.startswith("read in a step, and written"))
    assert read.split()[6:10] == ["20.48", "GB", "204.80", "MB"]
    lines = {line[:27].strip(): line[27:].split() for line in text.splitlines()}
    assert lines["file of a rank"] == ["20.48", "GB"] * 4
    options = {"weight_dtype": "bf16", "state_dtype": "bf16", "residency": "file", "storage_path": "."}
    one = partialfc.plan(10_000_000, 512, batch=128, sample_rate=0.01, **options)
    assert one.total_bytes < 600_000_000
    assert lines["memory of a rank"][2:4] == [f"{one.total_bytes / 1e6:.2f}", "MB"]
    # A quarter of the rows stay in memory.
    text = command(*where, "--residency", "file", "--cache", "5.12GB")
    lines = {line[:27].strip(): line[27:].split() for line in text.splitlines()}
    assert lines["file of a rank"] == ["15.36", "GB"] * 4
    assert lines["read in a step, and written"[:27]][:4] == ["15.36", "GB", "153.60", "MB"]
    assert lines["memory of a rank"][2:4] == [f"{(one.total_bytes + 5.12e9) / 1e9:.2f}", "GB"]
    assert "--cache is for rows on disk" in command(*where, "--cache", "1GB", code=1)


def test_plan_refuses():
    text = command("plan", "--classes", "4", "--ranks", "8", code=1)
    assert "num_classes must be at least 8" in text and "Traceback" not in text
    assert "Traceback" not in command("plan", "--classes", "many", code=2)


def test_info():
    assert partialfc.build_info() in command("info")


@installed
def test_a_c_program(tmp_path):
    needs("cc")
    (tmp_path / "main.c").write_text(C)
    flags = command("--cflags", "--libs").split()
    subprocess.run(["cc", "-Werror", "main.c", *flags, "-o", "main"], cwd=tmp_path, check=True)
    done = subprocess.run([tmp_path / "main"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == partialfc.build_info()


@installed
def test_a_program_of_cmake_after_a_move(tmp_path):
    needs("cmake")
    moved = tmp_path / "moved"
    shutil.copytree(command("--prefix").strip(), moved)
    (tmp_path / "main.c").write_text(C)
    (tmp_path / "CMakeLists.txt").write_text(CMAKE)
    for arguments in (["-S", ".", "-B", "build", f"-DCMAKE_PREFIX_PATH={moved}"], ["--build", "build"]):
        subprocess.run(["cmake", *arguments], cwd=tmp_path, check=True, capture_output=True)
    subprocess.run([tmp_path / "build/app"], check=True, capture_output=True)


@installed
def test_pkg_config_after_a_move(tmp_path):
    needs("pkg-config")
    moved = tmp_path / "moved"
    shutil.copytree(command("--prefix").strip(), moved)
    environment = {"PKG_CONFIG_PATH": str(moved / "lib/pkgconfig"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        ["pkg-config", "--cflags", "--libs", "partialfc"], env=environment, capture_output=True, text=True, check=True
    )
    include, folder, library = done.stdout.split()
    assert pathlib.Path(include[2:]).resolve() == moved / "include" and library == "-lpartialfc"
    assert (pathlib.Path(folder[2:]) / "libpartialfc.so.0").exists()


@installed
def test_the_headers_are_those_of_the_library():
    text = (PREFIX / "include/partialfc.h").read_text()
    assert importlib.metadata.version("partialfc") == partialfc.version()
    for part, number in zip(("MAJOR", "MINOR", "PATCH"), partialfc.version().split(".")):
        assert f"#define PFC_VERSION_{part} {number}\n" in text
    headers = {"partialfc.h", "partialfc.hpp", "partialfc_mpi.h", "partialfc_nccl.h"}
    assert {path.name for path in (PREFIX / "include").iterdir()} == headers
