# shellcheck shell=bash
# What the launch scripts share: errors, options, and commands that a dry run only prints.

shopt -s inherit_errexit # a failure inside $(…) is one

die() { # MESSAGE: one line on stderr, exit status 2
    echo "error: $*" >&2
    exit 2
}

usage() { # the comment at the head of the script that runs
    awk 'NR > 1 && !/^#/ {exit} NR > 1 {sub(/^# ?/, ""); print}' "$0"
}

value_of() { # OPTION COUNT: dies unless a value follows the option
    (($2 > 1)) || die "$1: a value must follow"
}

take_dry_run() { # WORDS…: sets WORDS to them without --dry-run, wherever it stands, and obeys it
    WORDS=()
    local word
    for word; do
        if [[ $word == --dry-run ]]; then
            DRY_RUN=1
        else
            WORDS+=("$word")
        fi
    done
}

need() { # VARIABLE OPTION: dies unless the variable is set
    [[ -n ${!1-} ]] || die "$2 is missing: give it, or set $1 (-h explains)"
}

need_program() { # PROGRAM: dies unless it is on the PATH; a dry run does without
    [[ -n ${DRY_RUN-} ]] || command -v "$1" >/dev/null || die "$1 is not on the PATH: install it"
}

quoted() { # WORDS…: as a shell would read them back
    local text
    printf -v text '%q ' "$@"
    printf '%s' "${text% }"
}

run() { # COMMAND…: runs it; a dry run prints it
    if [[ -n ${DRY_RUN-} ]]; then
        echo "+ $(quoted "$@")"
    else
        "$@"
    fi
}

try() { # COMMAND…: whether it succeeds, quietly; in a dry run nothing exists yet
    [[ -z ${DRY_RUN-} ]] && "$@" >/dev/null 2>&1
}

explain() { # TEXT: what the next command is for, in a dry run
    [[ -z ${DRY_RUN-} ]] || echo "# $*"
}

check_config() { # CONFIG [--dotted.key value …]: dies unless it loads; nothing is touched before
    "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/check.py" "$@" || exit 2
}

warn_uncommitted() { # says what will not be sent, or is not in the image
    local changed
    changed=$(git -C "$(dirname "${BASH_SOURCE[0]}")" status --porcelain 2>/dev/null | wc -l) || true
    ((changed == 0)) || echo "warning: $changed files have edits that are not committed, and $*" >&2
}
