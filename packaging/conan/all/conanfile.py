# SPDX-License-Identifier: Apache-2.0
import os

from conan import ConanFile
from conan.errors import ConanInvalidConfiguration
from conan.tools.build import valid_min_cppstd
from conan.tools.files import copy, get
from conan.tools.layout import basic_layout
from conan.tools.scm import Version

required_conan_version = ">=2.0"


class TaskvecConan(ConanFile):
    name = "taskvec"
    description = "Header-only C++20 tensor algorithms for reusing fine-tuned models"
    license = "Apache-2.0"
    url = "https://github.com/conan-io/conan-center-index"  # of the recipe: ConanCenter asks for its own
    homepage = "https://example.org/taskvec"  # stands for the project's address: packaging/README.md
    topics = ("machine-learning", "model-merging", "task-arithmetic", "lora", "header-only")
    package_type = "header-library"
    settings = "os", "arch", "compiler", "build_type"
    options = {"with_io": [True, False], "with_cuda": [True, False]}
    default_options = {"with_io": True, "with_cuda": False}
    no_copy_source = True

    @property
    def _oldest_compilers(self):
        return {"gcc": "12", "clang": "14", "apple-clang": "15", "msvc": "193"}

    def layout(self):
        basic_layout(self, src_folder="src")

    def requirements(self):
        # Headers only: whoever uses the package needs these headers too.
        self.requires("eigen/[>=3.4 <6]", transitive_headers=True)
        if self.options.with_io:
            self.requires("nlohmann_json/[>=3.10 <4]", transitive_headers=True)

    def package_id(self):
        self.info.clear()

    def validate(self):
        compiler = str(self.settings.compiler)
        oldest = self._oldest_compilers.get(compiler)
        if oldest is None or Version(self.settings.compiler.version) < oldest:
            raise ConanInvalidConfiguration(
                f"taskvec needs g++ 12 or clang 14, or later; this profile has {compiler} {self.settings.compiler.version}")
        if not valid_min_cppstd(self, 20):
            raise ConanInvalidConfiguration("taskvec needs C++20: give -s compiler.cppstd=20, or set it in the profile")

    def source(self):
        get(self, **self.conan_data["sources"][self.version], strip_root=True)

    def package(self):
        copy(self, "LICENSE", self.source_folder, os.path.join(self.package_folder, "licenses"))
        copy(self, "*", os.path.join(self.source_folder, "include"), os.path.join(self.package_folder, "include"))

    def package_info(self):
        self.cpp_info.set_property("cmake_file_name", "taskvec")
        self.cpp_info.bindirs = []
        self.cpp_info.libdirs = []
        core = self._component("core", [])
        core.set_property("pkg_config_name", "taskvec-core")
        if self.settings.os in ("Linux", "FreeBSD"):
            core.system_libs = ["pthread"]
        self._component("taskvec", ["core", "eigen::eigen"]).set_property("pkg_config_name", "taskvec")
        if self.options.with_io:
            self._component("io", ["taskvec", "nlohmann_json::nlohmann_json"]).set_property("pkg_config_name", "taskvec-io")
        if self.options.with_cuda:
            # The CUDA toolkit is the system's: its nvcc compiles the sources that use this component, as C++20.
            self._component("cuda", ["taskvec"]).system_libs = ["cudart", "cublas", "cusolver"]

    def _component(self, name, requires):
        component = self.cpp_info.components[name]
        component.set_property("cmake_target_name", f"taskvec::{name}")
        component.bindirs = []
        component.libdirs = []
        component.requires = requires
        return component
