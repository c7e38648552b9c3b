from conan import ConanFile
from conan.tools.cmake import CMake, CMakeToolchain, cmake_layout
from conan.tools.files import copy, get, rmdir

required_conan_version = ">=2.0"


class Dsv3Conan(ConanFile):
    name = "dsv3"
    version = "@VERSION@"
    description = "@DESCRIPTION@"
    license = "MIT"
    url = "@URL@"
    homepage = "@URL@"
    topics = ("machine-learning", "inference", "transformer", "deepseek", "single-header")
    package_type = "static-library"
    settings = "os", "arch", "compiler", "build_type"

    def configure(self):  # plain C
        self.settings.rm_safe("compiler.cppstd")
        self.settings.rm_safe("compiler.libcxx")

    def layout(self):
        cmake_layout(self, src_folder="src")

    def source(self):
        get(self, "@DOWNLOAD@/@ARCHIVE@", sha256="@SHA256@", strip_root=True)

    def generate(self):
        CMakeToolchain(self).generate()

    def build(self):
        cmake = CMake(self)
        cmake.configure()
        cmake.build()

    def package(self):
        copy(self, "LICENSE", src=self.source_folder, dst=self.package_folder + "/licenses")
        CMake(self).install()
        for folder in ("lib/cmake", "lib/pkgconfig", "share"):  # Conan writes its own from package_info
            rmdir(self, f"{self.package_folder}/{folder}")

    def package_info(self):
        self.cpp_info.set_property("cmake_file_name", "dsv3")
        self.cpp_info.set_property("cmake_target_name", "dsv3::all")
        header, static = self.cpp_info.components["header"], self.cpp_info.components["static"]
        header.set_property("cmake_target_name", "dsv3::dsv3")
        header.set_property("pkg_config_name", "dsv3")
        header.libdirs = []
        if self.settings.os != "Windows":
            header.system_libs = ["m"]
        static.set_property("cmake_target_name", "dsv3::static")
        static.set_property("pkg_config_name", "dsv3-static")
        static.libs = ["dsv3"]
        static.requires = ["header"]
