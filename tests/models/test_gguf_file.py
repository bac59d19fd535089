"""The container: every kind of metadata, block formats, and damaged files."""

import contextlib

import gguf
import numpy as np
import pytest

from jaxrlhf.core.errors import InputError
from jaxrlhf.models.gguf import dequantise, field, open_gguf


@pytest.fixture
def path(tmp_path):
    """A file with a field of each kind and the tensors "a" (float32), "b" (Q8_0), "c" (BF16)."""
    rng = np.random.default_rng(0)
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -3)
    writer.add_uint16("u16", 60_000)
    writer.add_int16("i16", -300)
    writer.add_uint32("u32", 4_000_000_000)
    writer.add_int32("i32", -70_000)
    writer.add_uint64("u64", 2**40)
    writer.add_int64("i64", -(2**40))
    writer.add_float32("f32", 0.5)
    writer.add_float64("f64", 0.1)
    writer.add_bool("bool", True)
    writer.add_string("string", "größe")
    writer.add_array("strings", ["a", "", "ç"])
    writer.add_array("numbers", [1, -2, 3])
    writer.add_array("nested", [[1, 2], [3]])
    a, b, c = (rng.standard_normal(shape).astype(np.float32) for shape in ((3, 5), (4, 64), (7,)))
    writer.add_tensor("a", a)
    for name, x, kind in (("b", b, "Q8_0"), ("c", c, "BF16")):
        kind = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quantize(x, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_open_gguf_reads_every_kind(path):
    fields = open_gguf(path).fields
    assert fields["general.architecture"] == "llama"
    assert {key: fields[key] for key in list(fields)[-15:]} == {
        "u8": 200, "i8": -3, "u16": 60_000, "i16": -300, "u32": 4_000_000_000, "i32": -70_000,
        "u64": 2**40, "i64": -(2**40), "f32": 0.5, "f64": 0.1, "bool": True, "string": "größe",
        "strings": ["a", "", "ç"], "numbers": [1, -2, 3], "nested": [[1, 2], [3]],
    }  # fmt: skip


@pytest.mark.parametrize("blocks", [1, 3, 2**12])
def test_dequantise_equals_the_package(path, blocks):
    file = open_gguf(path)
    reader = gguf.GGUFReader(path)
    for tensor in reader.tensors:
        want = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(dequantise(file, tensor.name, blocks), want)
    assert [t.name for t in reader.tensors] == list(file.tensors) == ["a", "b", "c"]


def test_field_of_another_type(path):
    file = open_gguf(path)
    assert field(file, "u8", int) == 200
    assert field(file, "absent", int, 7) == 7
    with pytest.raises(InputError, match=r"x\.gguf: string='größe'"):
        field(file, "string", int)


def test_open_gguf_cut_anywhere(path):
    whole = path.read_bytes()
    end = open_gguf(path).tensors["c"]
    for keep in range(1, end.start + 14, 7):
        path.write_bytes(whole[:keep])
        with pytest.raises(InputError, match=r"damaged|not a GGUF"):
            open_gguf(path)


def test_open_gguf_damaged_anywhere(path):
    """Nonsense in the header raises InputError or reads as something else, never anything worse."""
    whole = bytearray(path.read_bytes())
    for at in range(4, open_gguf(path).tensors["a"].start):
        for byte in (0x09, 0xFF):
            path.write_bytes(whole[:at] + bytes([byte]) + whole[at + 1 :])
            with contextlib.suppress(InputError):
                open_gguf(path)


def test_open_gguf_other_files(tmp_path):
    path = tmp_path / "x.gguf"
    with pytest.raises(InputError, match="cannot be read"):
        open_gguf(path)
    path.write_bytes(b"")
    with pytest.raises(InputError, match="cannot be read"):
        open_gguf(path)
    path.write_bytes(b"PK" + bytes(100))
    with pytest.raises(InputError, match="not a GGUF file"):
        open_gguf(path)
    path.write_bytes(b"GGUF\x01\x00\x00\x00" + bytes(100))
    with pytest.raises(InputError, match="version 1"):
        open_gguf(path)
