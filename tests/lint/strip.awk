# strip.awk - C without comments, string and character contents; lines keep their numbers. >>marks stay, as "@mark NAME".
{
    out = ""; line = $0; n = length(line)
    if (!comment && match(line, /^\/\* ==== >>[a-z]+/)) { print "@mark " substr(line, RSTART + 10, RLENGTH - 10); comment = line !~ /\*\/[ \t]*$/; next }
    for (i = 1; i <= n; i++) {
        ch = substr(line, i, 1); two = substr(line, i, 2)
        if (comment) { if (two == "*/") { comment = 0; i++; out = out " " } }
        else if (two == "/*") { comment = 1; i++ }
        else if (two == "//") break
        else if (ch == "\"" || ch == "'") {
            for (i++; i <= n && substr(line, i, 1) != ch; i++) if (substr(line, i, 1) == "\\") i++
            out = out ch ch
        }
        else out = out ch
    }
    sub(/[ \t]+$/, "", out)
    print out
}
