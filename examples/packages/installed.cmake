# For add_subdirectory of the folder that is installed; find_package(dsv3) does the same.
include("${CMAKE_CURRENT_LIST_DIR}/dsv3-config.cmake")
