# SPDX-License-Identifier: Apache-2.0
# A page of Markdown as doxygen is to read it: awk -f page.awk PAGE, in the project's root.
#
# Headings keep the anchors that links have for them, links lead to pages of the site and to the examples, and where one
# leads to a file that is no page its text remains.
function label_of(path)
{
    sub(/^docs\//, "", path); sub(/\/README\.md$/, "", path); sub(/\.md$/, "", path)
    gsub(/[\/.-]/, "_", path)
    return "page_" tolower(path)
}
# What a heading is called in links: as tests/documents/links.sh has it.
function slug_of(heading)
{
    heading = tolower(heading)
    gsub(/`/, "", heading); gsub(/[^a-z0-9 _-]/, "", heading); gsub(/ /, "-", heading)
    return heading
}
function path_of(link,    parts, part, k, n, kept)
{
    n = split(folder link, parts, "/")
    for (k = 1; k <= n; ++k) {
        if (parts[k] == "" || parts[k] == ".") { continue }
        if (parts[k] == "..") { --kept } else { part[++kept] = parts[k] }
    }
    link = part[1]
    for (k = 2; k <= kept; ++k) { link = link "/" part[k] }
    return link
}
function is_there(path,    line, found) { found = (getline line < path) > 0; close(path); return found }
function linked(text, target,    file, anchor, path, name)
{
    if (target ~ /:\/\// || target ~ /^mailto:/) { return "[" text "](" target ")" }
    anchor = ""
    if (match(target, /#/)) { anchor = substr(target, RSTART + 1); target = substr(target, 1, RSTART - 1) }
    path = target == "" ? self : path_of(target)
    if (path !~ /\.[a-z]+$/ && is_there(path "/README.md")) { path = path "/README.md" }
    if (path ~ /\.md$/) {
        if (anchor != "") { return "[" text "](@ref " label_of(path) "--" anchor ")" }
        return path == "README.md" ? "[" text "](@ref index)" : "[" text "](@ref " label_of(path) ")"
    }
    if (path ~ /^examples\/[a-z_]+\.cpp$/) {
        name = path
        sub(/^.*\//, "", name); sub(/\.cpp$/, "", name)
        return "<a href=\"" name "_8cpp-example.html\">" text "</a>"
    }
    return text
}
FNR == 1 {
    self = FILENAME
    if (index(self, ENVIRON["PWD"] "/") == 1) { self = substr(self, length(ENVIRON["PWD"]) + 2) }
    folder = self
    if (!sub(/[^\/]*$/, "", folder)) { folder = "" }
}
/^```/ { fenced = !fenced; print; next }
fenced { print; next }
/^# / && !titled {
    titled = 1
    print self == "README.md" ? $0 : $0 " {#" label_of(self) "}"
    if (self != "README.md") { print "[TOC]" }
    next
}
/^#+ / { heading = $0; sub(/^##* /, "", heading); print $0 " {#" label_of(self) "--" slug_of(heading) "}"; next }
{
    rest = $0
    line = ""
    while (match(rest, /`[^`]*`|!?\[[^]]*\]\([^() ]*\)/)) {
        line = line substr(rest, 1, RSTART - 1)
        found = substr(rest, RSTART, RLENGTH)
        rest = substr(rest, RSTART + RLENGTH)
        if (found ~ /^\[/) {
            text = found; sub(/\]\([^()]*\)$/, "", text); sub(/^\[/, "", text)
            target = found; sub(/^.*\]\(/, "", target); sub(/\)$/, "", target)
            found = linked(text, target)
        }
        line = line found
    }
    print line rest
}
