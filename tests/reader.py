"""A reader of stores, written from docs/format.md alone: all but bm25/. It reads whole files and is slow.

What it refuses with an ``AssertionError``, the page says MUST not be.
"""

import itertools
import json
import math
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import blake3
import xxhash
import zstandard

# Of the numbers of a column with scales: the largest float32 / 1,024.
LARGEST = (2 - 2**-23) * 2.0**117


def u64(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 8], "little")


def f32(x: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", x))[0])


def checksum(data: bytes) -> int:
    return xxhash.xxh3_64_intdigest(data, 0)


def align(n: int, a: int) -> int:
    return -(-n // a) * a


def bits(data: bytes, at: int, width: int) -> int:
    """The number of `width` bits that begins at bit `at`, from the lowest bits of the bytes up."""
    number = int.from_bytes(data[at // 8 : (at + width + 7) // 8], "little")
    return number >> at % 8 & (1 << width) - 1


class Frame:
    def __init__(self, data: bytes, kind: bytes) -> None:
        assert data[:8] == b"\x89PP" + kind + b"\r\n\x1a\n"
        assert int.from_bytes(data[8:12], "little") == 1
        block, tail = int.from_bytes(data[12:16], "little"), int.from_bytes(data[-16:-12], "little")
        assert block > 0
        assert tail % 64 == 0
        assert 64 <= tail <= 4096
        n = u64(data, len(data) - 32)
        table = data[64 + n : -tail]
        assert len(table) == 8 * -(-n // block)
        assert u64(data, len(data) - 8) == checksum(data[:64] + data[-tail:-8])
        assert u64(data, len(data) - 24) == checksum(table)
        self.body, self.fields = data[64 : 64 + n], data[-tail:-32]
        for i, at in enumerate(range(0, n, block)):
            assert u64(table, 8 * i) == checksum(self.body[at : at + block])

    def numbers(self, n: int) -> list[int]:
        return [u64(self.fields, 8 * i) for i in range(n)]


def presence(body: bytes, at: int, count: int, rows: int) -> list[int]:
    """The places in the range that have a row, in order."""
    if rows == count:
        return list(range(count))
    blocks = -(-count // 512)
    bitmap = int.from_bytes(body[at : at + 64 * blocks], "little")
    there = [i for i in range(512 * blocks) if bitmap >> i & 1]
    assert len(there) == rows
    assert not there or there[-1] < count
    for i in range(blocks):
        assert u64(body, at + 64 * blocks + 8 * i) == sum(j < 512 * i for j in there)
    return there


def number_list(packed: bytes, directory: bytes, count: int) -> list[int]:
    numbers = []
    for i in range(count):
        base, word = u64(directory, i // 128 * 16), u64(directory, i // 128 * 16 + 8)
        width, exponent, mantissa, offset = word & 127, word >> 7 & 63, word >> 13 & 2047, word >> 24
        slope = (mantissa << exponent) % 2**64
        packed_number = bits(packed, 128 * offset + i % 128 * width, width)
        numbers.append((base + i % 128 * slope + packed_number) % 2**64)
    return numbers


class Ids:
    def __init__(self, data: bytes) -> None:
        frame = Frame(data, b"I")
        self.first, self.count, rows, encoding, ascending, t, n, o, b = frame.numbers(9)
        body = frame.body
        table, at = body[:t], align(t, 8)
        keys, at = body[at : at + n], align(at + n, 8)
        offsets, at = body[at : at + o], at + o
        length = {3: 0, 4: -(-rows // b) + 1 if b else 0}.get(encoding, rows)
        directory, at = body[at : at + 16 * -(-length // 128)], at + 16 * -(-length // 128)
        there = presence(body, at, self.count, rows)
        order = body[at + (0 if rows == self.count else 72 * -(-self.count // 512)) :]
        self.ids: list[int | bytes]
        if encoding == 0:
            self.ids = list(number_list(keys, directory, rows))
        elif encoding == 1:
            self.ids = [table + b"%d" % n for n in number_list(keys, directory, rows)]
        elif encoding in (2, 3):
            symbols, at = [], 0
            while at < t:
                symbols.append(table[at + 1 : at + 2 + table[at]])
                at += 2 + table[at]
            if encoding == 2:
                self.ids = [digits(v, symbols) for v in number_list(keys, directory, rows)]
            else:
                width = -(-sum((len(s) - 1).bit_length() for s in symbols) // 8)
                self.ids = [packed(keys[i * width : (i + 1) * width], symbols) for i in range(rows)]
        else:
            self.ids = list(texts(keys, number_list(offsets, directory, length), b, rows))
        self.docnos = [self.first + i for i in there]
        width = (rows - 1).bit_length() if rows and not ascending else 0
        self.order = [bits(order, i * width, width) for i in range(rows)] if width else list(range(rows))
        assert sorted(range(rows), key=lambda row: (sort_key(self.ids[row]), row)) == self.order

    def find(self, id: int | bytes) -> list[int]:
        """The docnos that have this id, by binary search in the order."""
        low, high = 0, len(self.order)
        while low < high:
            middle = (low + high) // 2
            below = sort_key(self.ids[self.order[middle]]) < sort_key(id)
            low, high = (middle + 1, high) if below else (low, middle)
        found = []
        while low < len(self.order) and self.ids[self.order[low]] == id:
            found.append(self.docnos[self.order[low]])
            low += 1
        return found


def sort_key(id: int | bytes) -> tuple[int, bytes]:
    return (id, b"") if isinstance(id, int) else (len(id), id)


def digits(value: int, symbols: list[bytes]) -> bytes:
    out = []
    for those in reversed(symbols):
        value, digit = divmod(value, len(those))
        out.append(those[digit])
    assert value == 0
    return bytes(reversed(out))


def packed(key: bytes, symbols: list[bytes]) -> bytes:
    value, out = int.from_bytes(key, "big"), []
    for those in reversed(symbols):
        width = (len(those) - 1).bit_length()
        out.append(those[value & (1 << width) - 1])
        value >>= width
    assert value == 0
    return bytes(reversed(out))


def texts(data: bytes, offsets: list[int], block: int, rows: int) -> Iterator[bytes]:
    for start in range(0, rows, block):
        part, last = data[offsets[start // block] : offsets[start // block + 1]], min(start + block, rows) - 1
        before = b""
        for row in range(start, last + 1):
            shared, part = leb128(part) if row > start else (0, part)
            own, part = leb128(part) if row < last else (len(part), part)
            before, part = before[:shared] + part[:own], part[own:]
            yield before


def leb128(data: bytes) -> tuple[int, bytes]:
    if data[0] < 128:
        return data[0], data[1:]
    return data[0] - 128 + 128 * data[1], data[2:]


def roaring(data: bytes) -> set[int]:
    """The portable format of 64-bit Roaring bitmaps."""
    found, at = set(), 8
    for _ in range(u64(data, 0)):
        high, cookie = struct.unpack_from("<II", data, at)
        at += 8
        runs = b""
        if cookie & 0xFFFF == 12347:
            n = (cookie >> 16) + 1
            runs, at = data[at : at + (n + 7) // 8], at + (n + 7) // 8
        else:
            assert cookie == 12346
            n, at = int.from_bytes(data[at : at + 4], "little"), at + 4
        heads = [struct.unpack_from("<HH", data, at + 4 * i) for i in range(n)]
        at += 4 * n + (4 * n if not runs or n >= 4 else 0)
        for i, (key, cardinality) in enumerate(heads):
            base = (high << 32) + (key << 16)
            if runs and bits(runs, i, 1):
                k = int.from_bytes(data[at : at + 2], "little")
                for start, more in struct.iter_unpack("<HH", data[at + 2 : at + 2 + 4 * k]):
                    found.update(range(base + start, base + start + more + 1))
                at += 2 + 4 * k
            elif cardinality < 4096:
                found.update(
                    base + low for (low,) in struct.iter_unpack("<H", data[at : at + 2 * cardinality + 2])
                )
                at += 2 * cardinality + 2
            else:
                found.update(base + j for j in range(65536) if bits(data, 8 * at + j, 1))
                at += 8192
    assert at == len(data)
    return found


def tensors(data: bytes) -> dict[str, tuple[str, list[int], list[float]]]:
    """Of a safetensors file: dtype, shape and numbers of each tensor."""
    n = u64(data, 0)
    found = {}
    for name, info in json.loads(data[8 : 8 + n]).items():
        if name != "__metadata__":
            start, end = info["data_offsets"]
            raw = data[8 + n + start : 8 + n + end]
            if info["dtype"] == "BF16":
                raw, letter = b"".join(b"\0\0" + raw[i : i + 2] for i in range(0, len(raw), 2)), "f"
            else:
                letter = {"F32": "f", "F16": "e", "I8": "b"}[info["dtype"]]
            numbers = [x for (x,) in struct.iter_unpack("<" + letter, raw)]
            assert len(numbers) == math.prod(info["shape"])
            found[name] = (info["dtype"], info["shape"], numbers)
    return found


class Routes:
    def __init__(self, data: bytes, codec: str) -> None:
        frame = Frame(data, b"R")
        self.first, self.count, rows, width = frame.numbers(4)
        assert frame.fields[32:64].rstrip(b"\0").decode() == codec
        there = presence(frame.body, align(rows * width, 64), self.count, rows)
        self.records = {
            self.first + i: frame.body[row * width : (row + 1) * width] for row, i in enumerate(there)
        }
        self.scales = frame.fields[96:128].hex()


def scales(data: bytes) -> tuple[list[float], list[float]]:
    """A centre and a scale for each column; and whether what they were fitted to is possible."""
    frame = Frame(data, b"S")
    columns, _ = frame.numbers(2)
    assert len(frame.body) == 32 * columns
    numbers = [x for (x,) in struct.iter_unpack("<f", frame.body[: 8 * columns])]
    centres, scales = numbers[:columns], numbers[columns:]
    for centre, scale in zip(centres, scales, strict=True):
        assert scale >= 0
        assert abs(centre) + 128 * scale < 2.0**128
    for least, greatest, mean, deviation in struct.iter_unpack("<ffdd", frame.body[8 * columns :]):
        assert -LARGEST <= least <= mean <= greatest <= LARGEST
        assert 0 <= deviation <= (greatest - least) / 2
    return centres, scales


class Reader:
    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        first, second = (self.path / "CURRENT").read_text("ascii").splitlines()
        assert first == "polyprag store 1"
        name, digest = second.split(" ")
        assert re.fullmatch(r"manifest-\d{8,}\.json", name)
        raw = (self.path / name).read_bytes()
        assert blake3.blake3(raw).hexdigest() == digest
        self.manifest = json.loads(raw)
        self.spec = self.manifest["spec"]
        assert self.manifest["format"] == 1
        assert not self.manifest["reader_features"]
        self.codec, self.experts_of_group = self.spec["codec"], self.spec["experts"]
        self.groups = 1 + max(m["group"] for m in self.spec["modules"])
        self.dead = roaring(Frame(self.parts("dead")[0], b"X").body) if self.parts("dead") else set()
        self.ids = [Ids(data) for data in self.parts("ids")]
        assert sum(len(s.docnos) for s in self.ids) - len(self.dead) == self.manifest["documents"]
        self.decoder = tensors(self.parts("decoder")[0]) if self.parts("decoder") else {}
        self.router = tensors(self.parts("router")[0]) if self.parts("router") else None
        assert len(self.parts("router")) <= len(self.parts("decoder"))
        if self.router is not None:
            assert 1 <= len(self.router) <= 64
            for name, (dtype, shape, _) in self.router.items():
                assert re.fullmatch(r"[A-Za-z0-9._-]{1,128}", name)
                assert dtype == "F32"
                assert len(shape) in (1, 2)
                assert all(1 <= side < 2**32 for side in shape)
        self.experts = tensors(self.parts("experts")[0])
        self.kept = [Frame(data, b"D") for data in self.parts("documents")]
        self.routes = [Routes(data, self.codec) for data in self.parts("routes")]
        self.scales = {blake3.blake3(data).hexdigest(): scales(data) for data in self.parts("scales")}
        self.scales["00" * 32] = [], []

    def parts(self, role: str) -> list[bytes]:
        found = []
        for part in self.manifest["parts"]:
            if part["role"] == role:
                data = (self.path / part["file"]).read_bytes()
                assert len(data) == part["length"]
                assert blake3.blake3(data).hexdigest() == part["blake3"]
                found.append(data)
        return found

    def expert(self, name: str) -> list[float]:
        """The numbers of an A [K, r, in] or B [out, K, r]."""
        dtype, shape, numbers = self.experts[name]
        if dtype != "I8":
            return numbers
        _, _, scales = self.experts[f"{name}.scale"]
        rows, run = len(scales), shape[2] if name.endswith(".A") else 1
        return [f32(x * scales[i // run % rows]) for i, x in enumerate(numbers)]

    def __iter__(self) -> Iterator[str | int]:
        for segment in self.ids:
            for docno, id in zip(segment.docnos, segment.ids, strict=True):
                if docno not in self.dead:
                    yield id if isinstance(id, int) else id.decode()

    def docno(self, id: str | int) -> int | None:
        for segment in reversed(self.ids):
            alive = [
                d for d in segment.find(id.encode() if isinstance(id, str) else id) if d not in self.dead
            ]
            if alive:
                return alive[-1]
        return None

    def document(self, docno: int) -> dict[str, str | None]:
        kept: dict[str, str | None] = {"title": None, "text": None, "metadata": None}
        for frame in self.kept:
            first, count, blocks = frame.numbers(3)
            if not first <= docno < first + count:
                continue
            index = len(frame.body) - 24 * (blocks + 1)
            entries = list(struct.iter_unpack("<QQQ", frame.body[index:]))
            assert entries[-1][0] == count
            for (position, start, length), (end_position, end, _) in itertools.pairwise(entries):
                if position <= docno - first < end_position:
                    block = zstandard.ZstdDecompressor().decompress(frame.body[start:end], length)
                    assert len(block) == length
                    at = 0
                    for i in range(position, docno - first + 1):
                        flags, at = block[at], at + 1
                        for bit, field in enumerate(kept):
                            if flags >> bit & 1:
                                n = int.from_bytes(block[at : at + 4], "little")
                                value, at = block[at + 4 : at + 4 + n].decode(), at + 4 + n
                                if i == docno - first:
                                    kept[field] = value
        return kept

    def record(self, docno: int) -> tuple[bytes, tuple[list[float], list[float]]] | None:
        """The record of a document, and the centres and scales that it is to be read with."""
        for segment in self.routes:
            if docno in segment.records:
                return segment.records[docno], self.scales[segment.scales]
        return None

    def numbers(self, docno: int) -> list[float] | None:
        """What the codec keeps: logits, a code, or weights."""
        found = self.record(docno)
        if found is None:
            return None
        record, (centres, scales) = found
        if self.codec in ("f32", "f16"):
            return [x for (x,) in struct.iter_unpack("<f" if self.codec == "f32" else "<e", record)]
        if self.codec.startswith("sparse"):
            return self.sparse(record, int(self.codec[7:-1]))
        width = 4 if self.codec.endswith(",int4)") else 8 if "code" in self.codec else int(self.codec[1:])
        if width == 8:
            levels = [float(x) for (x,) in struct.iter_unpack("<b", record)]
        else:
            levels = [bits(record, i * width, width) - (2**width - 1) / 2 for i in range(len(scales))]
        return [f32(c + f32(s * level)) for c, s, level in zip(centres, scales, levels, strict=True)]

    def sparse(self, record: bytes, k: int) -> list[float]:
        wide = 1 if self.experts_of_group <= 256 else 2
        weights = []
        for at in range(0, len(record), k * (wide + 1)):
            indices, q = record[at : at + k * wide], record[at + k * wide : at + k * (wide + 1)]
            row = [0.0] * self.experts_of_group
            for i in range(k):
                row[int.from_bytes(indices[i * wide : (i + 1) * wide], "little")] = q[i] / sum(q)
            weights += row
        return weights

    def logits(self, docno: int) -> list[float] | None:
        z = self.numbers(docno)
        if z is None or not self.decoder:
            return z
        (_, (rows, d), v), (_, _, b) = self.decoder["V"], self.decoder["b"]
        return [math.fsum([b[i], *(v[i * d + j] * z[j] for j in range(d))]) for i in range(rows)]

    def weights(self, docno: int) -> list[float] | None:
        z, k = self.logits(docno), self.experts_of_group
        if z is None or self.codec.startswith("sparse"):
            return z
        weights = []
        for g in range(self.groups):
            group = z[g * k : (g + 1) * k]
            if self.spec["phi"] == "linear":
                weights += [(1.0 + x) / k for x in group]
                continue
            largest = sorted(range(k), key=lambda i: (-group[i], i))[: self.spec["top_k"] or k]
            if self.spec["phi"] == "sigmoid":
                group = [min(x, 0.0) - math.log1p(math.exp(-abs(x))) for x in group]
            top = max(group[i] for i in largest)
            raised = [math.exp(group[i] - top) if i in largest else 0.0 for i in range(k)]
            weights += [x / math.fsum(raised) for x in raised]
        return weights
