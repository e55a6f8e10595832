#!/usr/bin/env bash
# Builds the image of an earlier commit out of the git history, for the test of upgrades and downgrades: build/older/warren-image.tar,
# which holds warren:older, with that commit's manifests in build/older/manifests/. What was built before is used again.
# Usage: scripts/image/older.sh COMMIT
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$PWD
older=$root/build/older
commit=${1:?say which commit}

say() { echo "older: $*" >&2; }
die() { say "$*"; exit 1; }

# git_here reads the history whoever owns the clone.
git_here() { git -c safe.directory="$root" "$@"; }

[ "$(cat "$older/commit" 2>/dev/null)" != "$commit" ] || exit 0
git_here cat-file -e "$commit^{commit}" 2>/dev/null ||
  die "commit $commit is not in this clone: it needs the whole history (git fetch --unshallow), or the test another commit (OLDER=COMMIT)"
say "building the image of $commit"
rm -rf "$older"
mkdir -p "$older/source/build"
git_here archive "$commit" | tar --extract --directory "$older/source"
ln -s "$root/build/cache" "$older/source/build/cache"
make --no-print-directory --directory "$older/source" VERSION="older-${commit:0:12}" image >&2

work=$older/image
mkdir "$work"
tar --extract --file "$older/source/build/warren-image.tar" --directory "$work"
sed -i 's|"RepoTags":\["[^"]*"\]|"RepoTags":["warren:older"]|' "$work/manifest.json"
grep -q '"warren:older"' "$work/manifest.json" || die "the image of $commit has no tag to replace"
(cd "$work" && tar --create --file "$older/warren-image.tar" -- *)
mv "$older/source/manifests" "$older/manifests"
rm -f "$older"/manifests/*.go # or this commit's tests would run them
rm -rf "$work" "$older/source"
echo "$commit" >"$older/commit"
