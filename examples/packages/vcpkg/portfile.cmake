vcpkg_check_linkage(ONLY_STATIC_LIBRARY)
vcpkg_download_distfile(archive
    URLS "@DOWNLOAD@/@ARCHIVE@"
    FILENAME "@ARCHIVE@"
    SHA512 @SHA512@
)
vcpkg_extract_source_archive(source ARCHIVE "${archive}")
set(VCPKG_BUILD_TYPE release) # plain C: one library serves both
vcpkg_cmake_configure(SOURCE_PATH "${source}" OPTIONS -DDSV3_CMAKEDIR=share/dsv3)
vcpkg_cmake_install()
vcpkg_fixup_pkgconfig()
vcpkg_install_copyright(FILE_LIST "${source}/LICENSE")
