"""The variants that kernels/tune.h has beside what ships, for kernels/gates and the GPU check. As a program it writes VARIANT/SOURCE for
each source that a variant changes."""

import pathlib
import re


def read(kernels):
    """{variant: the names of the sources that it changes}, from `enum class Variant` of the folder's tune.h."""
    text = (kernels / "tune.h").read_text(encoding="utf-8")
    body = re.search(r"^enum class Variant \{\n(.*?)^\};", text, re.MULTILINE | re.DOTALL)[1]
    return {name: of.split() for of, name in re.findall(r"^ +// of ([\w ]+):(?:.*\n +//)*.*\n +(\w+),$", body, re.MULTILINE)}


if __name__ == "__main__":
    for variant, sources in read(pathlib.Path(__file__).resolve().parent).items():
        print(*(f"{variant}/{source}" for source in sources))
