"""Damaged and forged checkpoints. The hashes of a forged one are made anew and don't show it."""

from __future__ import annotations

import io
import os
import pickle

import torch
from checkpoint.samples import (
    join_header,
    split_header,
)

W0, W1 = "weights_00000.safetensors", "weights_00001.safetensors"


def tensor(content, name="weights/head.weight"):
    return content["tensors"][name]


EXP_AVG = "optimizer/exp_avg/head.weight"


def drop_expert(content):
    tensor(content, "weights/moe.experts.up_proj")["pieces"].pop()


def repeat_expert(content):
    fragments = tensor(content, "weights/moe.experts.up_proj")["pieces"]
    fragments.insert(1, list(fragments[0]))


def swap(content):
    tensor(content)["pieces"].reverse()


def rename(name):
    def change(content):
        content["files"][0][0] = name

    return change


FORGED = [
    (drop_expert, "experts 2 to 3 are missing in tensor 'weights/moe.experts.up_proj'"),
    (repeat_expert, "experts 0 to 1 are duplicated in tensor 'weights/moe.experts.up_proj'"),
    (lambda c: c["moe_layers"].update(moe=8), "up_proj.*has 4 experts.*num_experts=8"),
    (swap, "weights/head.weight.*are not in any file"),
    (lambda c: tensor(c)["shape"].append(2), "weights/head.weight.*its fragments end at 35"),
    (lambda c: tensor(c).update(shape=[2**40, 2**40]), "weights/head.weight.*invalid shape"),
    (lambda c: tensor(c).update(shape=[-5, -7]), "weights/head.weight.*invalid shape"),
    (lambda c: tensor(c).update(shape=[True, 35]), "weights/head.weight.*not a list of integers"),
    (
        lambda c: tensor(c).update(shape=[2**61], pieces=[[0, 2**61, 5, "0" * 8]]),
        "invalid shape",
    ),
    (
        lambda c: tensor(c).update(shape=[2**50], pieces=[[0, 2**50, 5, "0" * 8]]),
        "weights_00000.*in all",
    ),
    (lambda c: tensor(c).update(dtype="F128"), "weights/head.weight.*dtype 'F128'"),
    (lambda c: tensor(c).update(dtype=["F32"]), "weights/head.weight.*'dtype' is missing or no"),
    (
        lambda c: tensor(c)["pieces"].__setitem__(0, [0, 0, 5, "0" * 8]),
        "head.weight.*fragment of 0",
    ),
    (lambda c: tensor(c)["pieces"][0].__setitem__(2, 99), "head.weight.*file number 99"),
    (lambda c: tensor(c)["pieces"][0].__setitem__(2, -1), "head.weight.*file number -1"),
    (lambda c: tensor(c)["pieces"][0].__setitem__(1, 1.5), "head.weight.*expected"),
    (lambda c: c["tensors"].update({"other/a": tensor(c)}), "other/a.*is not a tensor name"),
    (lambda c: c["tensors"].update({"weights/a": 3}), "weights/a.*missing"),
    (rename("../../etc/passwd"), r"\.\./\.\./etc/passwd.*not a checkpoint file name"),
    (rename("/etc/passwd"), "/etc/passwd.*not a checkpoint file name"),
    (rename("a\n.json"), "not a checkpoint file name"),
    (rename("manifest.json"), "not a checkpoint file name"),
    (lambda c: c["files"].append(list(c["files"][0])), "listed twice"),
    (lambda c: c["files"][0].__setitem__(1, -1), "an invalid size"),
    (lambda c: c["files"][0].__setitem__(1, 10**9), "the manifest says 1000000000"),
    (lambda c: c.update(format="zip"), "it was not written by this package"),
    (lambda c: c.update(format_version=2), "format_version 2.*newer.*upgrade"),
    (lambda c: c.update(format_version=True), "'format_version' is missing or not of type int"),
    (lambda c: c.update(surprise=1), "unknown fields.*surprise"),
    (lambda c: c.pop("tied"), "'tied' is missing"),
    (lambda c: c["topology"].update(world_size="2"), "'world_size' is missing or not of type int"),
    (lambda c: c.update(excluded=[1]), "'excluded' is not of type str"),
    (lambda c: c.update(excluded=["a", "a"]), "'excluded' lists an entry twice"),
    (lambda c: c.update(contents=[]), "contents is ..; it must be"),
    (lambda c: c.update(contents=["optimizer", "weights"]), "contents is .*it must be"),
    (lambda c: c.update(contents=["weights"]), "exp_avg/head.weight.*but contents is"),
    (lambda c: c["progress"].update(epoch=-1), "'epoch' holds -1, which must be 0 to"),
    (lambda c: c["progress"].update(epoch=2**63), "'epoch' holds 9223372036854775808"),
    (lambda c: c["progress"].update(epoch=1.0), "'epoch' is missing or not of type int"),
    (lambda c: c["progress"].update(epoch=True), "'epoch' is missing or not of type int"),
    (lambda c: c["progress"].pop("epoch"), "progress: the field 'epoch' is missing"),
    (lambda c: c["progress"].update(loss=1), "progress: unknown fields"),
    (lambda c: c["topology"].update(world_size=0), "'world_size' holds 0, which must be 1 to"),
    (lambda c: c["topology"].update(expert_parallel_size=3), "the topology .* is invalid"),
    (lambda c: c["topology"].update(zero_stage=4), "the topology .* is invalid"),
    (lambda c: c["moe_layers"].update(moe=0), "'moe_layers' holds 0, which must be 1 to"),
    (lambda c: c["moe_layers"].update(moe=4.0), "'moe_layers' is not of type int"),
    (lambda c: c["moe_layers"].update(other=4), "'other': none of its 4 experts"),
    (lambda c: c.update(tied={"a": "gone"}), "'a' is listed as stored under 'gone'"),
    (lambda c: c.update(tied={"half": "mask"}), "'half' is listed .* but is also stored itself"),
    (lambda c: c.update(tied={"a" * 5000: "mask"}), "a name of 5000 characters"),
    (lambda c: c.update(module_experts={"moe": [["a", "a"], [], [], []]}), "lists a name twice"),
    (lambda c: c["files"].reverse(), "files must be sorted by name"),
    (lambda c: c["files"][0].__setitem__(1, 10**30), "an invalid size"),
    (lambda c: c["files"][0].__setitem__(1, 350.0), "expected .str, int, str."),
    (lambda c: c["files"][0].__setitem__(2, "g" * 64), "an invalid size or SHA-256"),
    (lambda c: c["files"][0].__setitem__(2, c["files"][0][2].upper()), "an invalid size or SHA-2"),
    (rename("a.json"), "'a.json' is not a checkpoint file name"),
    (lambda c: c["files"].pop(), "file number .* does not exist"),
    (lambda c: c["files"].insert(0, ["a.json", 1, "0" * 64]), "'a.json' is not a checkpoint file"),
    (lambda c: tensor(c)["pieces"][0].__setitem__(0, -1), "invalid position"),
    (lambda c: tensor(c)["pieces"][0].__setitem__(1, 10**4000), "invalid position"),
    (lambda c: tensor(c)["pieces"][0].__setitem__(3, ""), "digest ''"),
    (lambda c: tensor(c)["pieces"][0].__setitem__(3, "ABCDEF01"), "digest 'ABCDEF01'"),
    (lambda c: tensor(c)["pieces"][0].append(1), "head.weight.*expected"),
    (lambda c: tensor(c).update(shape=[10**4000, 10**4000]), "head.weight.*invalid shape"),
    (lambda c: tensor(c).update(shape=[1] * 65 + [35]), "head.weight.*invalid shape"),
    (lambda c: tensor(c).update(extra=1), "head.weight.*unknown fields"),
    (lambda c: c["tensors"].update({"weights/\ud800": tensor(c)}), "is not a tensor name"),
    (lambda c: tensor(c, EXP_AVG).update(shape=[7, 5]), "7, 5., which does not fit parameter"),
    (lambda c: c["tensors"].pop("weights/head.weight"), "'head.weight' does not exist"),
    (
        lambda c: c["tensors"].update({"weights/a": c["tensors"].pop(EXP_AVG)}),
        "'weights/a' is listed in optimizer_00000.safetensors, which holds another kind",
    ),
]


KEY = "weights/head.weight[0:17]"


def edit(change):
    def edited(data):
        header, payload = split_header(data)
        change(header)
        return join_header(header, payload)

    return edited


def swap_offsets(header):
    keys = [k for k in header if k != "__metadata__"]
    a, b = keys[0], keys[1]
    header[a]["data_offsets"] = header[b]["data_offsets"]


HEADERS = [
    (lambda d: (2**63).to_bytes(8, "little") + d[8:], "claims a header of 9223372036854775808"),
    (lambda d: len(d).to_bytes(8, "little") + d[8:], "claims a header of"),
    (lambda d: d[:5], "should hold|cut short"),
    (edit(lambda h: h.pop(KEY)), "does not hold elements 0 to 17 of tensor 'weights/head.weight'"),
    (edit(lambda h: h.update({"x[0:1]": h[KEY]})), "holds 'x.0:1.', which the manifest"),
    (edit(lambda h: h[KEY].update(shape=[1, 17])), "entry of 'weights/head.weight.0:17.'"),
    (edit(lambda h: h[KEY].update(shape=[2**60])), "entry of 'weights/head.weight.0:17.'"),
    (edit(lambda h: h[KEY].update(dtype="F64")), "entry of 'weights/head.weight.0:17.'"),
    (edit(lambda h: h[KEY].update(dtype="I32")), "head.weight' has 17 elements of I32"),
    (edit(lambda h: h[KEY].update(dtype=[])), "entry of 'weights/head.weight.0:17.'"),
    (edit(lambda h: h[KEY].update(data_offsets=[-68, 0])), "entry of 'weights/head.weight.0:17."),
    (edit(lambda h: h[KEY].update(data_offsets=[0, 2**70])), "entry of 'weights/head.weight.0:17."),
    (edit(lambda h: h[KEY].update(data_offsets=[400, 468])), "begins at byte|tensors end at"),
    (lambda d: d + b"\0" * 8, "tensors end at"),
    (lambda d: join_header([], split_header(d)[1]), "not a JSON object"),
    (edit(lambda h: h.update(__metadata__={"a": 1})), "__metadata__ is not a map of strings"),
    (edit(lambda h: h[KEY].update(shape=[True])), "entry of 'weights/head.weight.0:17.'"),
    (edit(lambda h: h[KEY].update(shape=[17.0])), "entry of 'weights/head.weight.0:17.'"),
    (edit(lambda h: h[KEY].update(shape=[10**4000])), "entry of 'weights/head.weight.0:17.'"),
    (edit(lambda h: h[KEY].update(extra=1)), "entry of 'weights/head.weight.0:17.'"),
    (edit(swap_offsets), "begins at byte|entry of"),
]


DEEP = b'{"$tuple": [' * 450 + b"]}" * 450
EXTRA = {
    "deep": DEEP,
    "deeper": b"[" * 100_000 + b"]" * 100_000,
    "no objects.pt": b'{"$object": 0}',
    "far object": b'{"$object": 1000000000}',
    "object before": b'{"$object": -1}',
    "object true": b'{"$object": true}',
    "object float": b'{"$object": 0.0}',
    "tensor -1": b'{"$tensor": ["F32", [-1], [1.0, 2.0]]}',
    "tensor true": b'{"$tensor": ["F32", [true], [1.0]]}',
    "tensor short": b'{"$tensor": ["F32", [2], [1.0]]}',
    "tensor huge": b'{"$tensor": ["F32", [1000000000000000000000, 0], []]}',
    "tensor long": b'{"$tensor": ["U8", [2000], [' + b"1," * 1999 + b"1]]}",
    "tensor dtype": b'{"$tensor": ["F128", [1], [1.0]]}',
    "tensor cut": b'{"$tensor": ["I64", [1], [1.5]]}',
    "tensor bool": b'{"$tensor": ["BOOL", [1], [2]]}',
    "tensor overflow": b'{"$tensor": ["I8", [1], [300]]}',
    "tensor overflow 64": b'{"$tensor": ["I64", [1], [1' + b"0" * 40 + b"]]}",
    "tensor flat": b'{"$tensor": ["F32", 1, [1.0]]}',
    "tuple of text": b'{"$tuple": "abc"}',
    "tuple of map": b'{"$tuple": {"a": 1}}',
    "float": b'{"$float": "1.0"}',
    "float list": b'{"$float": ["nan"]}',
    "bytes": b'{"$bytes": "a!b"}',
    "bytes list": b'{"$bytes": [1]}',
    "dict twice": b'{"$dict": [[1, 2], [1, 3]]}',
    "dict of map": b'{"$dict": {"a": 1}}',
    "dict of text": b'{"$dict": ["ab", "cd"]}',
    "dict of lists": b'{"$dict": [[[1], 2]]}',
    "two keys": b'{"$tuple": [1], "a": 2}',
    "unknown": b'{"$set": [1]}',
    "infinite": b"1e999",
    "nan": b"NaN",
    "twice": b'{"a": 1, "a": 2}',
}
"""Values that no save writes."""


def with_extra(path, value: bytes) -> bytes:
    text = (path / "state.json").read_bytes()
    assert text.count(b'"extra_state": {}') == 1
    return text.replace(b'"extra_state": {}', b'"extra_state": {"a": ' + value + b"}")


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("BOMB_WENT_OFF",))


def pickled(zipped: bool) -> bytes:
    if not zipped:
        return pickle.dumps([Bomb()], protocol=2)
    buffer = io.BytesIO()
    torch.save([Bomb()], buffer)
    return buffer.getvalue()


def damage(path, name, how) -> None:
    file = path / name
    match how:
        case "flipped":
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 8
            file.write_bytes(data)
        case "cut":
            file.write_bytes(file.read_bytes()[:-1])
        case "longer":
            file.write_bytes(file.read_bytes() + b"\0")
        case "missing":
            file.unlink()
        case "renamed":
            file.rename(path / f"x{name}")
        case "a link":
            file.rename(path.parent / name)
            file.symlink_to(path.parent / name)


DAMAGES = ("flipped", "cut", "longer", "missing", "renamed", "a link")
