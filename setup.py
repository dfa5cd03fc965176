"""Build the compiled modules of dynwire.

Every extension is listed by name: a glob would hide a missing file. Switches, all from the environment:

``DYNWIRE_BUILD_DEBUG=1``      no optimisation, assertions in the C code
``DYNWIRE_BUILD_SANITIZE=1``   AddressSanitizer and UndefinedBehaviorSanitizer (``make test-asan``)
``DYNWIRE_BUILD_ANNOTATE=1``   Cython's HTML annotation beside every source
``DYNWIRE_BUILD_NO_EXT=1``     no compiled modules: the Makefile builds them in place and then only registers the package
"""

import os
import sys

from Cython.Build import cythonize
from setuptools import Extension, setup

# fmt: off
MODULES = [
    "_buffers", "_context", "_link", "_frames", "_hpack", "_http2", "_http2lib", "_httpwire",
    "_awaitable", "_tcpio", "_httpio", "_portal", "_kvhash", "_kvtree", "_natsproto", "_natsport", "_natswire",
    "_natsqueue", "_natsio",
]
# fmt: on

debug = os.environ.get("DYNWIRE_BUILD_DEBUG") == "1"
sanitize = os.environ.get("DYNWIRE_BUILD_SANITIZE") == "1"
jobs = min(4, os.cpu_count() or 1)

# -UNDEBUG: some Pythons were configured with -DNDEBUG, which would remove the assertions
compile_args = ["-O0", "-g", "-UNDEBUG"] if debug or sanitize else ["-O2", "-g0", "-fno-plt"]
link_args: list[str] = []
if sanitize:
    # -O1: fast enough for the fuzz loops, and the reports still carry usable line numbers
    compile_args[0] = "-O1"
    compile_args += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
    link_args += ["-fsanitize=address,undefined"]

extensions = [
    Extension(
        f"dynwire.{name}",
        [f"cython_src/dynwire/{name}.pyx"],
        extra_compile_args=compile_args,
        extra_link_args=link_args,
    )
    for name in MODULES
]

if os.environ.get("DYNWIRE_BUILD_NO_EXT") == "1":
    extensions = []

# sources and metadata need no C code; a build front end asks for them several times before it compiles
if not {"sdist", "egg_info", "dist_info"}.intersection(sys.argv):
    extensions = cythonize(
        extensions,
        include_path=["cython_src"],
        annotate=os.environ.get("DYNWIRE_BUILD_ANNOTATE") == "1",
        nthreads=jobs,
        compiler_directives={
            "language_level": 3,
            "embedsignature": True,
            "binding": True,
            "cdivision": True,
            "initializedcheck": False,
        },
    )

setup(ext_modules=extensions, options={"build_ext": {"parallel": jobs}})
