#!/bin/sh
# install.sh install | uninstall -- what `make install` and `make uninstall` run, from the top of the repository, with
# BUILD, VERSION, DESTDIR, PREFIX, INCLUDEDIR, LIBDIR, BINDIR, DATADIR and MANDIR in the environment. What is installed is
# listed once, for both. Modes do not depend on the umask, and folders may have blanks in their names.
set -eu
umask 022
action=$1
here=examples/packages
for name in PREFIX INCLUDEDIR LIBDIR BINDIR DATADIR MANDIR; do # the files below name them: no path may depend on where we are
    eval "case \$$name in /*) ;; *) $name=\$(pwd)/\$$name ;; esac; export $name"
done
LIBRARY=libdsv3.a CMAKEDIR=$LIBDIR/cmake/dsv3
PC_INCLUDEDIR=$INCLUDEDIR PC_LIBDIR=$LIBDIR # in pkg-config files, what lies below the prefix is counted from it
case $INCLUDEDIR in "$PREFIX"/*) PC_INCLUDEDIR='${prefix}'${INCLUDEDIR#"$PREFIX"} ;; esac
case $LIBDIR in "$PREFIX"/*) PC_LIBDIR='${prefix}'${LIBDIR#"$PREFIX"} ;; esac
export VERSION LIBRARY CMAKEDIR PC_INCLUDEDIR PC_LIBDIR

# put MODE SOURCE FOLDER NAME: a copy, with its variables filled in if it is a template (*.in).
put() {
    folder=${DESTDIR:-}$3 file=${DESTDIR:-}$3/$4
    rm -f "$file"
    [ "$action" = install ] || return 0
    mkdir -p "$folder"
    case $2 in *.in) sh $here/fill.sh "$2" > "$file" ;; *) cp "$2" "$file" ;; esac
    chmod "$1" "$file"
}
put 644 dsv3.h "$INCLUDEDIR" dsv3.h
for header in examples/*.h; do put 644 "$header" "$INCLUDEDIR/dsv3" "${header#examples/}"; done
put 644 "$BUILD/lib/$LIBRARY" "$LIBDIR" $LIBRARY
put 755 "$BUILD/dsv3" "$BINDIR" dsv3
put 644 "$BUILD/dsv3.1" "$MANDIR/man1" dsv3.1
put 644 LICENSE "$DATADIR/doc/dsv3" LICENSE
put 644 $here/dsv3.pc.in "$DATADIR/pkgconfig" dsv3.pc
put 644 $here/dsv3-static.pc.in "$LIBDIR/pkgconfig" dsv3-static.pc
for file in dsv3-config.cmake dsv3-config-version.cmake; do put 644 $here/$file.in "$CMAKEDIR" $file; done
put 644 $here/installed.cmake "$CMAKEDIR" CMakeLists.txt
[ "$action" = install ] && exit
rmdir "${DESTDIR:-}$INCLUDEDIR/dsv3" "${DESTDIR:-}$DATADIR/doc/dsv3" "${DESTDIR:-}$CMAKEDIR" 2> /dev/null || :
