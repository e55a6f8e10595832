# Makes image archives that "docker load", "ctr images import" and "kind load image-archive" take; to be sourced.
# shellcheck shell=bash

# archive FOLDER TAGS FILE [CONFIG]: packs a root file system as an image of one layer, with one tag or several. CONFIG is
# the image's configuration in JSON: Entrypoint, Cmd, Env and so on.
archive() {
  local folder=$1 tags=$2 file=$3 config=${4:-'{}'} work digest
  work=$(mktemp -d "$file.XXXXXX")
  tar --create --file "$work/layer.tar" --directory "$folder" --sort=name --mtime=@0 --numeric-owner --xattrs \
    --exclude='./proc/*' --exclude='./sys/*' --exclude='./dev/*' .
  digest=$(sha256sum "$work/layer.tar" | cut -d' ' -f1)
  jq -n --argjson config "$config" --arg digest "sha256:$digest" --arg arch "$(dpkg --print-architecture)" '{
    architecture: $arch, os: "linux",
    config: ({Env: ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]} + $config),
    rootfs: {type: "layers", diff_ids: [$digest]}}' >"$work/config.json"
  jq -n --arg tags "$tags" '[{Config: "config.json", RepoTags: ($tags / " "), Layers: ["layer.tar"]}]' >"$work/manifest.json"
  tar --create --file "$work/image.tar" --directory "$work" config.json manifest.json layer.tar
  mv "$work/image.tar" "$file"
  rm -r "$work"
}
