"""WebDataset shards for tests, of small pictures of one colour."""

from __future__ import annotations

import io
import tarfile

from PIL import Image

from dad_fast.data.sources.tar import TarSource


def picture(value, kind="JPEG", size=(12, 10), **options):
    content = io.BytesIO()
    Image.new("RGB", size, (value, 255 - value, 7)).save(content, kind, **options)
    return content.getvalue()


def write_tar(path, members, **options):
    """`members`: (name, content) pairs, or TarInfos without content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))
    return path


def sample(key, label, value=None):
    return [
        (f"{key}.jpg", picture(10 * label if value is None else value)),
        (f"{key}.cls", str(label).encode()),
    ]


def write_shards(folder, num=3, per_shard=4, name="train-{:06d}.tar"):
    for shard in range(num):
        samples = (sample(f"{shard:03d}{i}", (shard * per_shard + i) % 5) for i in range(per_shard))
        write_tar(folder / name.format(shard), [member for pair in samples for member in pair])
    return folder


def one_shard(tmp_path, members, **options):
    """A source of one shard that holds two good samples and `members`."""
    path = write_tar(
        tmp_path / "one.tar", [*sample("good0", 0), *sample("good1", 1), *members], **options
    )
    return TarSource(path.parent, [path.name], max_bad_share=0.6)
