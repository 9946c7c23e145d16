#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# What the tool writes about itself, read by what it is for: pages.sh TOOL doctor|manual|bash|zsh|fish [PROGRAM]
set -eu
tool=$1 part=$2 program=${3-}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
fail() { echo "$*" >&2; exit 1; }
# Of what is offered, each word must be there.
offers() { # LINE WORD...
    line=$1
    shift
    offered=$(offered_for "$line")
    for word in "$@"; do
        printf '%s\n' "$offered" | grep -qxF -e "$word" || fail "$part offers no '$word' for '$line', but: $(echo $offered)"
    done
}
lacks() { # LINE WORD
    if offered_for "$1" | grep -qxF -e "$2"; then fail "$part offers '$2' for '$1'"; fi
}
all() {
    offers 'taskvec ' merge inspect peru-fft help doctor
    offers 'taskvec me' merge merge-lora
    offers 'taskvec merge --de' --density --device
    offers 'taskvec merge --method tie' ties
    offers 'taskvec merge --scope ' model tensor
    offers 'taskvec help pru' prune
    offers 'taskvec completion ' bash zsh fish
    mkdir models
    : > models/base.safetensors
    : > model.safetensors
    offers 'taskvec merge --base mod' model.safetensors models/
    offers 'taskvec inspect mod' model.safetensors models/
    lacks 'taskvec merge --copy-from mod' model.safetensors
    lacks 'taskvec inspect --' --method
}

case $part in
doctor)
    "$tool" --version > version.txt
    grep -qx 'taskvec [0-9.]*' version.txt
    for fact in compiler: processor: libraries: linked: 'optional parts:'; do grep -q "^$fact  *." version.txt || fail "--version names no $fact"; done
    "$tool" doctor > doctor.txt
    for fact in 'instruction set' 'kernels' 'threads' 'memory' 'device' 'locale' 'outputs' 'problem'; do
        grep -q "^$fact:  *." doctor.txt || fail "doctor says nothing about: $fact"
    done
    grep -qx 'problem:  *none' doctor.txt
    "$tool" doctor --json | grep -qx '  "problems": \[\],'
    code=0
    "$tool" doctor --out missing > doctor.txt 2> said.txt || code=$?
    [ $code = 1 ] && [ "$(wc -l < said.txt)" = 1 ] && grep -q "^taskvec: error: 'missing' is no directory" said.txt
    # Few open files are a problem of many shards.
    if (ulimit -n 100 && "$tool" doctor) > doctor.txt 2>&1; then fail "100 open files are no problem for doctor"; fi
    grep -q 'ulimit -n' doctor.txt
    mkdir left
    : > left/.taskvec-1-0.tmp
    "$tool" doctor --out left | grep -q "^advice:  *1 temporary file"
    ;;
manual)
    "$tool" manual --out pages
    [ "$(ls pages | wc -l)" -gt 18 ] || fail "pages of verbs are missing: $(ls pages)"
    # No date: the pages of one version are the same bytes.
    "$program" -T lint -W warning pages/*.1 > lint.txt || true
    if grep -v 'missing date' lint.txt; then fail "mandoc complains about the pages"; fi
    "$program" -T utf8 pages/taskvec-merge.1 | sed 's/.\x08//g' > merge.txt
    for text in '--method METHOD' '--density D' 'Merge fine-tuned\|merge fine-tuned' 'task-arithmetic' 'taskvec merge --method ties'; do
        grep -q -e "$text" merge.txt || fail "the page of merge does not say '$text'"
    done
    "$tool" manual > one.1
    cmp one.1 pages/taskvec.1
    if "$tool" manual nonsense 2> said.txt; then fail "'manual nonsense' is no error"; fi
    grep -q 'none of the verbs' said.txt
    ;;
bash)
    "$tool" completion bash > taskvec.bash
    "$program" -n taskvec.bash
    cat > ask.bash <<'END'
source taskvec.bash
read -r -a COMP_WORDS <<< "$1"
[[ $1 == *" " ]] && COMP_WORDS+=("")
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
_taskvec
printf '%s\n' "${COMPREPLY[@]}"
END
    # Bash itself marks folders; of several the script leaves that to it.
    offered_for() { "$program" --norc ask.bash "$1" | while read -r word; do if [ -d "$word" ]; then echo "${word%/}/"; else echo "$word"; fi; done; }
    all
    ;;
fish)
    "$tool" completion fish > taskvec.fish
    "$program" --no-execute taskvec.fish
    offered_for() { HOME=$work "$program" --no-config -c "source taskvec.fish; complete -C '$1'" | cut -f 1; }
    all
    ;;
zsh)
    "$tool" completion zsh > _taskvec
    "$program" -n _taskvec
    "$program" -f -c 'zmodload zsh/zpty && zpty session true' > /dev/null 2>&1 || {
        echo "skipped: no pseudo terminal opens here, in which zsh completes"
        exit 77
    }
    # Completion runs in a line editor only, and so in a terminal: here, what the widget is handed is caught.
    cat > ask.zsh <<'END'
fpath=("$PWD" $fpath)
autoload -Uz compinit && compinit -u -d "$PWD/dump"
compadd() {
    local -a given
    builtin compadd -O given "$@" 2>/dev/null
    print -l -- $given > "$PWD/offered.$((++count))"
    builtin compadd "$@"
}
ask() {
    zle complete-word
    : > "$PWD/answered"
}
zle -N ask
bindkey '^I' ask
END
    cat > drive.zsh <<'END'
zmodload zsh/zpty
zpty session "$1 -f -i"
zpty -w session "cd '$PWD'; PS1=; source ask.zsh; print READY"
zpty -r session line '*READY*READY*'
zpty -w -n session "$2"$'\t'
repeat 600; do
    [[ -e answered ]] && break
    sleep 0.05
done
zpty -w -n session $'\x03'
zpty -d session
END
    offered_for() {
        rm -f offered.* answered
        "$program" -f drive.zsh "$program" "$1" > /dev/null 2>&1 || true
        cat offered.* 2>/dev/null | while read -r word; do if [ -d "$word" ]; then echo "${word%/}/"; else echo "$word"; fi; done
    }
    all
    ;;
esac
