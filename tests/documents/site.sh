#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The reference is made without a warning, all its links lead to files, and a public name without a comment makes it
# fail: sh site.sh FOLDER
set -eu
cd "$(dirname "$0")/../.."
out=$1
command -v doxygen > /dev/null || { echo "skipped: doxygen was not found (Debian: doxygen)"; exit 0; }
rm -rf "$out"
scripts/site "$out"

pages=$(ls "$out/html" | grep -c '\.html$')
[ "$pages" -gt 500 ] || { echo "the reference has $pages pages only"; exit 1; }
for name in structtaskvec_1_1ties__options group__methods page_design own_method_8cpp-example; do
    [ -e "$out/html/$name.html" ] || { echo "the reference has no $name.html"; exit 1; }
done
for name in 'taskvec::merge ' 'taskvec::truncated_svd ' 'taskvec::safetensors_file' 'taskvec::jvp '; do
    grep -rqF "$name" "$out/html" --include='*.html' || { echo "the reference lacks $name"; exit 1; }
done
! grep -rlE 'taskvec::detail::[a-z_]+ (Struct|Class)' "$out/html" --include='*.html' || { echo "the reference has what is in detail"; exit 1; }
(cd "$out/html" && grep -ohE '(href|src)="[^":#]+["#]' ./*.html | sed 's/^[a-z]*="//; s/.$//' | sort -u | while read -r file; do
    [ -e "$file" ] || echo "a page links to $file, which is not there"
done) > "$out/broken"
[ ! -s "$out/broken" ] || { cat "$out/broken"; exit 1; }

# Every kind of name, without a comment.
bare=$out/bare/include/taskvec
mkdir -p "$bare/core"
cat > "$bare/core/bare.hpp" <<'END'
// A header without comments.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#define TASKVEC_BARE 1
namespace taskvec::inline TASKVEC_ABI {
struct bare_struct {
    int inside = 0;
};
/// Has one.
struct clothed {
    int bare_member = 0;
    [[nodiscard]] int bare_call() const;
    [[nodiscard]] bool empty() const; // as of the standard library
};
using bare_alias = int;
enum class bare_enum { one };
template <class T>
concept bare_concept = sizeof(T) > 1;
template <class T>
inline constexpr bool bare_variable = true;
[[nodiscard]] int bare_function(int);
/// Has one.
template <class T>
void twice(T);
template <class T, class U>
void twice(T, U); // and so has its overload
namespace detail {
int nobody_sees();
} // namespace detail
} // namespace taskvec::inline TASKVEC_ABI
END
HEADERS=$bare scripts/site "$out/bare" > "$out/bare.txt" 2>&1 && { echo "a header without comments passes"; exit 1; }
for name in TASKVEC_BARE bare_struct bare_member bare_call bare_alias bare_enum bare_concept bare_variable bare_function; do
    grep -q "$name.* is not documented" "$out/bare.txt" || { echo "$name passes without a comment"; cat "$out/bare.txt"; exit 1; }
done
for name in empty twice nobody_sees; do
    ! grep -q "Member $name" "$out/bare.txt" || { echo "$name needs no comment"; exit 1; }
done
echo "$pages pages, no warning"
