# SPDX-License-Identifier: Apache-2.0
import os
import re

from conan import ConanFile
from conan.errors import ConanInvalidConfiguration
from conan.tools.build import check_min_cppstd
from conan.tools.layout import basic_layout
from conan.tools.files import copy, load
from conan.tools.scm import Version

ROOT = os.path.join("..", "..")


class TaskvecConan(ConanFile):
    name = "taskvec"
    description = "Header-only C++20 tensor algorithms for reusing fine-tuned models"
    license = "Apache-2.0"
    topics = ("machine-learning", "model-merging", "task-arithmetic", "lora", "header-only")
    package_type = "header-library"
    settings = "os", "arch", "compiler", "build_type"
    options = {"with_io": [True, False], "with_cuda": [True, False]}
    default_options = {"with_io": True, "with_cuda": False}
    no_copy_source = True

    def set_version(self):
        text = load(self, os.path.join(self.recipe_folder, ROOT, "include", "taskvec", "core", "config.hpp"))
        parts = [re.search(rf"^#define TASKVEC_VERSION_{part} (\d+)$", text, re.M).group(1) for part in ("MAJOR", "MINOR", "PATCH")]
        self.version = ".".join(parts)

    def export_sources(self):
        root = os.path.join(self.recipe_folder, ROOT)
        for pattern in ("LICENSE", "include/*"):
            copy(self, pattern, root, self.export_sources_folder)

    def layout(self):
        basic_layout(self)

    def requirements(self):
        # Headers only: whoever uses the package needs these headers too.
        self.requires("eigen/[>=3.4 <6]", transitive_headers=True)
        if self.options.with_io:
            self.requires("nlohmann_json/[>=3.10 <4]", transitive_headers=True)

    def validate(self):
        check_min_cppstd(self, 20)
        oldest = {"gcc": "12", "clang": "14", "apple-clang": "15"}.get(str(self.settings.compiler))
        if oldest is None or Version(self.settings.compiler.version) < oldest:
            raise ConanInvalidConfiguration("taskvec needs gcc 12 or clang 14, or later")

    def package_id(self):
        self.info.clear()

    def package(self):
        copy(self, "LICENSE", self.source_folder, os.path.join(self.package_folder, "licenses"))
        copy(self, "*", os.path.join(self.source_folder, "include"), os.path.join(self.package_folder, "include"))

    def package_info(self):
        self.cpp_info.set_property("cmake_file_name", "taskvec")
        core = self.cpp_info.components["core"]
        core.set_property("cmake_target_name", "taskvec::core")
        core.bindirs = []
        core.libdirs = []
        whole = self.cpp_info.components["taskvec"]
        whole.set_property("cmake_target_name", "taskvec::taskvec")
        whole.bindirs = []
        whole.libdirs = []
        whole.requires = ["core", "eigen::eigen"]
        if self.settings.os in ("Linux", "FreeBSD"):
            core.system_libs = ["pthread"]
        if self.options.with_io:
            io = self.cpp_info.components["io"]
            io.set_property("cmake_target_name", "taskvec::io")
            io.bindirs = []
            io.libdirs = []
            io.requires = ["taskvec", "nlohmann_json::nlohmann_json"]
        if self.options.with_cuda:
            # The CUDA toolkit is the system's: its nvcc compiles the sources that use this component, as C++20.
            cuda = self.cpp_info.components["cuda"]
            cuda.set_property("cmake_target_name", "taskvec::cuda")
            cuda.bindirs = []
            cuda.libdirs = []
            cuda.requires = ["taskvec"]
            cuda.system_libs = ["cudart", "cublas", "cusolver"]
