//! Experts against a reference in f64, and files that somebody altered.

use half::{bf16, f16};
use proptest::collection::vec;
use proptest::prelude::*;
use serde_json::json;

use super::*;

const CHUNK: u32 = source::CHUNK as u32;

/// A module of `inner` and `outer` features for each pair.
fn spec(experts: u32, rank: u32, features: &[(u32, u32)]) -> StoreSpec {
    let modules: Vec<_> = features
        .iter()
        .enumerate()
        .map(|(i, (inner, outer))| {
            json!({"name": format!("m{i}"), "in_features": inner, "out_features": outer, "group": 0})
        })
        .collect();
    serde_json::from_value(json!({
        "modules": modules, "experts": experts, "rank": rank, "alpha": 32.0,
        "codec": "f32", "phi": "sigmoid", "mixing": "exact",
        "combination": {"k": 1, "rule": "mean", "temperature": 1.0}, "id_type": "string",
        "keep_title": true, "keep_text": true, "keep_metadata": true,
        "analyser": {"name": "unicode-v1", "stemmer": null},
    }))
    .unwrap()
}

fn le(numbers: &[f32]) -> Vec<u8> {
    numbers.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// An empty folder, and experts of a spec in it.
struct Folder {
    _tmp: tempfile::TempDir,
    dir: Directory,
    spec: StoreSpec,
}

impl Folder {
    fn new(spec: StoreSpec) -> Self {
        let tmp = tempfile::tempdir().unwrap();
        let dir = Directory::open(tmp.path()).unwrap();
        Self {
            _tmp: tmp,
            dir,
            spec,
        }
    }

    /// Writes numbers, one list for each tensor of the spec.
    fn write(&self, name: &str, numbers: &[Vec<f32>], dtype: Option<Dtype>) -> Result<Digest> {
        let data: Vec<_> = numbers.iter().map(|x| le(x)).collect();
        self.write_raw(name, Dtype::F32, &data, dtype)
    }

    fn write_raw(
        &self,
        name: &str,
        own: Dtype,
        data: &[Vec<u8>],
        dtype: Option<Dtype>,
    ) -> Result<Digest> {
        let given: Vec<_> = places(&self.spec)
            .into_iter()
            .zip(data)
            .map(|(place, data)| Tensor {
                name: place.name,
                dtype: own,
                shape: place.shape,
                data,
            })
            .collect();
        Experts::write(&self.dir, name, &given, &self.spec, dtype)
    }

    fn open(&self, name: &str) -> Result<Experts> {
        let length = std::fs::metadata(self.dir.path_of(name)).unwrap().len();
        Experts::open(self.dir.map(name, length).unwrap(), &self.spec)
    }

    /// A file with any header and any bytes.
    fn forge(&self, header: &serde_json::Value, body: &[u8]) -> Result<Experts> {
        let header = header.to_string();
        let mut bytes = (header.len().next_multiple_of(8) as u64)
            .to_le_bytes()
            .to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(8), b' ');
        bytes.extend_from_slice(body);
        self.dir.remove("forged").unwrap();
        self.dir.write_part("forged", &bytes).unwrap();
        self.open("forged")
    }

    fn files(&self) -> Vec<String> {
        self.dir.list().unwrap()
    }
}

/// The row k * r + j of a number of a tensor, from its indices in C order.
fn row_of(spec: &StoreSpec, place: &Place, number: usize) -> usize {
    let (second, third) = (place.shape[1], place.shape[2]);
    let index = [
        number / (second * third),
        number / third % second,
        number % third,
    ];
    let (k, j) = match place.name.ends_with(".A") {
        true => (index[0], index[1]),
        false => (index[1], index[2]),
    };
    k * spec.rank as usize + j
}

/// Compares what a file of `dtype` holds with the numbers that were given.
fn check(spec: &StoreSpec, experts: &Experts, given: &[Vec<f32>]) {
    experts.verify(&Progress::unseen()).unwrap();
    let places = places(spec);
    assert_eq!(
        (experts.tensors().len(), given.len()),
        (places.len(), places.len())
    );
    for ((tensor, place), given) in experts.tensors().iter().zip(&places).zip(given) {
        assert_eq!(
            (&tensor.raw.name, &tensor.raw.shape),
            (&place.name, &place.shape)
        );
        let raw = tensor.raw.bytes();
        assert!(raw.as_ptr().addr().is_multiple_of(experts.dtype().width()));
        let read = tensor.to_f32();
        assert_eq!(read.len(), given.len());
        let rows = (spec.experts * spec.rank) as usize;
        let mut largest = vec![0f64; rows];
        for (i, x) in given.iter().enumerate() {
            let row = row_of(spec, place, i);
            largest[row] = largest[row].max(f64::from(x.abs()));
        }
        let scales: Option<Vec<f64>> = tensor.scale.as_ref().map(|view| {
            assert_eq!(view.shape, [spec.experts as usize, spec.rank as usize]);
            assert!(view.bytes().as_ptr().addr().is_multiple_of(4));
            let words = view.bytes().chunks(4).map(|w| w.try_into().unwrap());
            words.map(|w| f64::from(f32::from_le_bytes(w))).collect()
        });
        assert_eq!(scales.is_some(), experts.dtype() == Dtype::Int8);
        for (i, (x, y)) in given.iter().zip(&read).enumerate() {
            let (row, wide) = (row_of(spec, place, i), f64::from(*x));
            let what = || format!("number {i} of {}: {x:e} became {y:e}", place.name);
            match experts.dtype() {
                Dtype::F32 => assert_eq!(x.to_bits(), y.to_bits(), "{}", what()),
                Dtype::Bf16 => assert_eq!(bf16::from_f32(*x).to_f32(), *y, "{}", what()),
                Dtype::F16 => assert_eq!(f16::from_f32(*x).to_f32(), *y, "{}", what()),
                Dtype::Int8 => {
                    let scale = scales.as_ref().unwrap()[row];
                    assert_eq!(scale == 0.0, largest[row] == 0.0, "{}", what());
                    // The scale is no wider than it needs to be, up to the precision of f32.
                    let fitted = largest[row] / 127.0;
                    assert!((scale - fitted).abs() <= (fitted * 2e-7).max(2f64.powi(-149)));
                    let real = f64::from(raw[i].cast_signed()) * scale;
                    assert!(
                        (real - wide).abs() <= scale / 2.0,
                        "{}, scale {scale:e}",
                        what()
                    );
                    assert_eq!(real as f32, *y, "{}", what());
                    assert!(y.is_finite());
                }
            }
        }
    }
}

/// Whether `dtype` has a number near `x`.
fn fits(dtype: Dtype, x: f32) -> bool {
    match dtype {
        Dtype::F16 => x.abs() < 65_520.0,
        Dtype::Bf16 => f64::from(x.abs()) < 2f64.powi(128) - 2f64.powi(119),
        Dtype::F32 | Dtype::Int8 => true,
    }
}

/// Numbers as experts have them, and the corners of f32.
fn number() -> impl Strategy<Value = f32> {
    prop_oneof![
        6 => -1f32..1.0,
        2 => Just(0.0),
        1 => any::<u32>().prop_map(f32::from_bits).prop_filter("finite", |x| x.is_finite()),
        1 => prop::sample::select(vec![
            -0.0, f32::MAX, f32::MIN, f32::MIN_POSITIVE, f32::from_bits(1), f32::from_bits(190),
            65_519.0, 65_520.0, f32::from_bits(0x7f7f_7fff), f32::from_bits(0x7f7f_8000),
        ]),
    ]
}

fn case() -> impl Strategy<Value = (StoreSpec, Vec<Vec<f32>>)> {
    (1u32..5, 1u32..4, vec((1u32..8, 1u32..8), 1..4)).prop_flat_map(|(k, r, features)| {
        let spec = spec(k, r, &features);
        let sizes: Vec<usize> = places(&spec)
            .iter()
            .map(|p| p.shape.iter().product())
            .collect();
        let tame = vec(0u8..4, sizes.len());
        let numbers: Vec<_> = sizes.into_iter().map(|n| vec(number(), n)).collect();
        // Most tensors without the corners, so that narrow dtypes are not always refused.
        (Just(spec), numbers, tame).prop_map(|(spec, mut numbers, tame)| {
            for (numbers, tame) in numbers.iter_mut().zip(tame) {
                for x in numbers.iter_mut().filter(|_| tame > 0) {
                    *x = x.clamp(-2.0, 2.0);
                }
            }
            (spec, numbers)
        })
    })
}

proptest! {
    #[test]
    fn every_dtype_keeps_its_bound_there_and_in_a_rewrite(
        (spec, numbers) in case(), dtype in prop::sample::select(&Dtype::ALL[..]),
    ) {
        let folder = Folder::new(spec);
        folder.write("plain", &numbers, None).unwrap();
        let plain = folder.open("plain").unwrap();
        prop_assert_eq!(plain.dtype(), Dtype::F32);
        check(&folder.spec, &plain, &numbers);
        let written = folder.write("direct", &numbers, Some(dtype));
        let rewritten = plain.rewrite(&folder.dir, "detour", dtype, &Progress::unseen());
        if !numbers.iter().flatten().all(|x| fits(dtype, *x)) {
            for error in [written.unwrap_err(), rewritten.unwrap_err()] {
                prop_assert!(matches!(&error, Error::InvalidInput(m) if m.contains("too large")));
            }
            prop_assert_eq!(folder.files(), ["plain"]);
            return Ok(());
        }
        let written = written.unwrap();
        prop_assert_eq!(rewritten.unwrap(), written);
        prop_assert_eq!(folder.dir.digest("direct").unwrap(), written);
        let experts = folder.open("direct").unwrap();
        prop_assert_eq!(experts.dtype(), dtype);
        check(&folder.spec, &experts, &numbers);
        // As it is; and widened and back, which int8 does not promise: its scales are fitted anew.
        prop_assert_eq!(experts.rewrite(&folder.dir, "same", dtype, &Progress::unseen()).unwrap(), written);
        experts.rewrite(&folder.dir, "wide", Dtype::F32, &Progress::unseen()).unwrap();
        let wide = folder.open("wide").unwrap();
        for (narrow, wide) in experts.tensors().iter().zip(wide.tensors()) {
            prop_assert_eq!(le(&narrow.to_f32()), wide.raw.bytes());
        }
        if dtype != Dtype::Int8 {
            prop_assert_eq!(wide.rewrite(&folder.dir, "back", dtype, &Progress::unseen()).unwrap(), written);
        }
    }

    #[test]
    fn noise_for_a_file_is_never_a_panic(
        keep in 0usize..700, at in 0usize..700, flip in 1u8.., dtype in 0usize..4,
    ) {
        let folder = Folder::new(spec(2, 2, &[(3, 2)]));
        let sizes = [12, 8];
        let numbers: Vec<Vec<f32>> = sizes.iter().map(|n| vec![0.5; *n]).collect();
        folder.write("f", &numbers, Some(Dtype::ALL[dtype])).unwrap();
        let mut bytes = std::fs::read(folder.dir.path_of("f")).unwrap();
        bytes.truncate(keep);
        if let Some(byte) = bytes.get_mut(at) {
            *byte ^= flip;
        }
        folder.dir.write_part("g", &bytes).unwrap();
        match folder.open("g") {
            Ok(experts) => {
                let _ = experts.verify(&Progress::unseen());
                experts.tensors().iter().for_each(|t| assert!(t.to_f32().len() <= 12));
            }
            Err(e) => prop_assert!(matches!(e, Error::CorruptStore { .. }), "{:?}", e),
        }
    }
}

#[test]
fn tensors_of_many_pieces_and_writes() {
    // More than a piece in a row of A, in a line of B, and in all; none of them a multiple of it.
    let wide = spec(3, 2, &[(CHUNK * 2 + 7, 5), (11, CHUNK + 3)]);
    let many = spec(301, 227, &[(3, 2)]);
    for spec in [wide, many] {
        let folder = Folder::new(spec);
        let mut seed = 1u64;
        let mut draw = |_| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 40) as f32 / 2f32.powi(23) - 1.0
        };
        let numbers: Vec<Vec<f32>> = places(&folder.spec)
            .iter()
            .map(|p| (0..p.shape.iter().product()).map(&mut draw).collect())
            .collect();
        for dtype in Dtype::ALL {
            let written = folder.write(dtype.name(), &numbers, Some(dtype)).unwrap();
            assert_eq!(folder.dir.digest(dtype.name()).unwrap(), written);
            check(&folder.spec, &folder.open(dtype.name()).unwrap(), &numbers);
        }
    }
}

#[test]
fn what_is_given_as_float16_stays_so_or_is_converted() {
    let folder = Folder::new(spec(2, 2, &[(3, 2)]));
    let numbers: Vec<Vec<f32>> = [12, 8]
        .iter()
        .map(|n| {
            (0..*n)
                .map(|i| f16::from_f32(i as f32 * 0.3 - 1.0).to_f32())
                .collect()
        })
        .collect();
    let half = |x: &Vec<f32>| {
        x.iter()
            .flat_map(|x| f16::from_f32(*x).to_le_bytes())
            .collect()
    };
    let data: Vec<Vec<u8>> = numbers.iter().map(half).collect();
    for dtype in [
        None,
        Some(Dtype::F16),
        Some(Dtype::F32),
        Some(Dtype::Bf16),
        Some(Dtype::Int8),
    ] {
        let name = dtype.map_or("as given", Dtype::name);
        folder.write_raw(name, Dtype::F16, &data, dtype).unwrap();
        let experts = folder.open(name).unwrap();
        assert_eq!(experts.dtype(), dtype.unwrap_or(Dtype::F16));
        check(&folder.spec, &experts, &numbers);
    }
    let error = folder
        .write_raw("int8 given", Dtype::Int8, &data, None)
        .unwrap_err();
    assert!(error.to_string().contains("float16, got int8"), "{error}");
}

#[test]
fn a_lora_is_counted_with_its_scales() {
    let folder = Folder::new(spec(3, 2, &[(5, 4), (7, 6)]));
    let numbers: Vec<Vec<f32>> = [30, 24, 42, 36].iter().map(|n| vec![1.0; *n]).collect();
    for (dtype, bytes) in [
        (Dtype::F32, 2 * 22 * 4),
        (Dtype::Bf16, 2 * 22 * 2),
        (Dtype::F16, 2 * 22 * 2),
        // Two rows of each of four tensors have a scale.
        (Dtype::Int8, 2 * 22 + 2 * 4 * 4),
    ] {
        folder.write(dtype.name(), &numbers, Some(dtype)).unwrap();
        let experts = folder.open(dtype.name()).unwrap();
        assert_eq!(experts.lora_bytes(&folder.spec), bytes, "{dtype}");
    }
}

/// Header and body of a file of K = 1, r = 1, in = 3, out = 2, from (name, dtype, shape, bytes).
fn parts(tensors: &[(&str, &str, serde_json::Value, Vec<u8>)]) -> (serde_json::Value, Vec<u8>) {
    let (mut header, mut body) = (serde_json::Map::new(), Vec::new());
    for (name, dtype, shape, bytes) in tensors {
        let start = body.len();
        body.extend_from_slice(bytes);
        let offsets = [start, body.len()];
        let info = json!({"dtype": dtype, "shape": shape, "data_offsets": offsets});
        header.insert((*name).into(), info);
    }
    (header.into(), body)
}

#[test]
fn a_file_that_is_not_what_the_spec_says_is_refused_at_open() {
    let folder = Folder::new(spec(1, 1, &[(3, 2)]));
    let a = || ("m0.A", "I8", json!([1, 1, 3]), vec![1, 2, 3]);
    let b = || ("m0.B", "I8", json!([2, 1, 1]), vec![4, 5]);
    let scale = |name, x: f32| (name, "F32", json!([1, 1]), x.to_le_bytes().to_vec());
    let (sa, sb) = (|x| scale("m0.A.scale", x), |x| scale("m0.B.scale", x));
    let forge = |tensors: &[_]| {
        let (header, body) = parts(tensors);
        folder.forge(&header, &body)
    };
    let good = forge(&[sa(0.5), sb(0.0), a(), b()]).unwrap();
    good.verify(&Progress::unseen()).unwrap();
    let read: Vec<_> = good.tensors().iter().map(ExpertTensor::to_f32).collect();
    assert_eq!(read, [vec![0.5, 1.0, 1.5], vec![0.0, 0.0]]);
    // The order is free, as long as everything is aligned.
    let free = forge(&[
        sb(0.0),
        a(),
        ("m0.B", "I8", json!([2, 1, 1]), vec![4, 5]),
        sa(0.5),
    ]);
    let misaligned = free.unwrap_err().to_string();
    assert!(
        misaligned.contains("\"m0.A.scale\" aligned"),
        "{misaligned}"
    );
    forge(&[sb(0.0), sa(0.5), b(), a()]).unwrap();

    let refused = |tensors: &[_], expected: &str| {
        let error = forge(tensors).unwrap_err();
        assert!(matches!(error, Error::CorruptStore { .. }), "{error:?}");
        assert!(error.to_string().contains(expected), "{error}");
    };
    refused(&[a(), b()], "4 tensors, found 2");
    refused(&[sa(0.5), a(), b()], "4 tensors, found 3");
    refused(&[sa(0.5), scale("other", 1.0), a(), b()], "m0.B.scale");
    refused(
        &[sa(0.5), sb(1.0), scale("other", 1.0), a(), b()],
        "4 tensors, found 5",
    );
    for bad in [
        f32::NAN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        -1.0,
        -f32::MIN_POSITIVE,
        f32::MAX,
    ] {
        refused(&[sa(bad), sb(1.0), a(), b()], "\"m0.A.scale\" from 0 to");
        refused(&[sa(1.0), sb(bad), a(), b()], "\"m0.B.scale\" from 0 to");
    }
    let half = ("m0.B.scale", "F16", json!([1, 1]), vec![0, 0]);
    refused(&[sa(0.5), half, a(), b()], "\"m0.B.scale\" as float32");
    let flat = ("m0.B.scale", "F32", json!([1]), vec![0; 4]);
    refused(&[sa(0.5), flat, a(), b()], "\"m0.B.scale\" of [1, 1]");
    let floats = ("m0.B", "F32", json!([2, 1, 1]), vec![0; 8]);
    refused(&[sa(0.5), sb(0.5), floats, a()], "\"m0.B\" as int8");
    let wide = ("m0.A", "F64", json!([1, 1, 3]), vec![0; 24]);
    refused(&[wide, b()], "float32 or bfloat16 or float16 or int8");
    let unsigned = ("m0.A", "U8", json!([1, 1, 3]), vec![0; 3]);
    refused(&[sa(0.5), sb(0.5), unsigned, b()], "U8");
    for huge in [
        json!([1, 1, u64::MAX]),
        json!([u64::MAX, u64::MAX, 2]),
        json!([1u64 << 40, 1, 3]),
    ] {
        refused(
            &[sa(0.5), sb(0.5), ("m0.A", "I8", huge, vec![0; 3]), b()],
            "header",
        );
    }
    let f32s = |name, shape, n: usize| (name, "F32", shape, vec![0; 4 * n]);
    let (fa, fb) = (
        f32s("m0.A", json!([1, 1, 3]), 3),
        f32s("m0.B", json!([2, 1, 1]), 2),
    );
    forge(&[fa.clone(), fb.clone()])
        .unwrap()
        .verify(&Progress::unseen())
        .unwrap();
    refused(
        &[fa.clone(), fb.clone(), sa(1.0), sb(1.0)],
        "2 tensors, found 4",
    );
    refused(
        &[fa.clone(), ("m0.B", "BF16", json!([2, 1, 1]), vec![0; 4])],
        "\"m0.B\" as float32",
    );
    refused(
        &[f32s("m0.A", json!([3, 1, 1]), 3), fb.clone()],
        "\"m0.A\" of [1, 1, 3]",
    );
    refused(&[f32s("m1.A", json!([1, 1, 3]), 3), fb], "\"m0.A\"");
}

#[test]
fn a_spec_of_huge_modules_takes_no_memory() {
    let most = i32::MAX as u32;
    let folder = Folder::new(spec(65_535, 8, &[(most, most)]));
    folder.spec.validate().unwrap();
    let (header, body) = parts(&[
        ("m0.A", "I8", json!([1, 1, 3]), vec![1, 2, 3]),
        ("m0.B", "I8", json!([2, 1, 1]), vec![4, 5]),
        ("m0.A.scale", "I8", json!([1]), vec![4]),
        ("m0.B.scale", "I8", json!([1]), vec![4]),
    ]);
    assert!(matches!(
        folder.forge(&header, &body),
        Err(Error::CorruptStore { .. })
    ));
    let error = folder.write("f", &[vec![], vec![]], None).unwrap_err();
    assert!(error.to_string().contains("bytes, got 0"), "{error}");
}

#[test]
fn numbers_that_no_writer_writes_are_found_by_verify_and_not_rewritten() {
    let folder = Folder::new(spec(2, 1, &[(3, 4)]));
    for (dtype, bad) in [
        (Dtype::F32, f32::NAN.to_le_bytes().to_vec()),
        (Dtype::Bf16, bf16::INFINITY.to_le_bytes().to_vec()),
        (Dtype::F16, f16::NEG_INFINITY.to_le_bytes().to_vec()),
        (Dtype::Int8, vec![0x80]),
    ] {
        let numbers = [vec![0.5; 6], vec![0.5; 8]];
        folder.write(dtype.name(), &numbers, Some(dtype)).unwrap();
        let path = folder.dir.path_of(dtype.name());
        let mut bytes = std::fs::read(&path).unwrap();
        let last = bytes.len() - dtype.width();
        bytes[last..].copy_from_slice(&bad);
        std::fs::write(&path, &bytes).unwrap();
        let experts = folder.open(dtype.name()).unwrap();
        for error in [
            experts.verify(&Progress::unseen()).unwrap_err(),
            experts
                .rewrite(&folder.dir, "other", Dtype::Int8, &Progress::unseen())
                .unwrap_err(),
        ] {
            assert!(matches!(error, Error::CorruptStore { .. }), "{error:?}");
            assert!(error.to_string().contains("\"m0.B\""), "{error}");
        }
        assert!(!folder.files().contains(&"other".into()));
    }
}

#[test]
fn a_file_that_is_there_is_neither_replaced_nor_removed() {
    let folder = Folder::new(spec(1, 1, &[(1, 1)]));
    folder.write("f", &[vec![1.0], vec![1.0]], None).unwrap();
    let before = folder.dir.digest("f").unwrap();
    let error = folder
        .open("f")
        .unwrap()
        .rewrite(&folder.dir, "f", Dtype::Bf16, &Progress::unseen())
        .unwrap_err();
    assert_eq!(error.io_kind(), Some(std::io::ErrorKind::AlreadyExists));
    assert_eq!(folder.dir.digest("f").unwrap(), before);
}

#[test]
fn scales_at_the_ends_of_f32() {
    for bits in (1..600)
        .chain((0x7f7f_ff00..=0x7f7f_ffff).step_by(3))
        .chain([0x7f7f_ffff])
    {
        let most = f32::from_bits(bits);
        let scale = source::scale_for(most);
        assert!(scale > 0.0 && scale <= MAX_SCALE, "{most:e}");
        assert!((scale * 127.0).is_finite(), "{most:e}");
        assert!(f64::from(scale) * 127.5 >= f64::from(most), "{most:e}");
    }
    assert_eq!(source::scale_for(0.0), 0.0);
    assert_eq!(source::scale_for(127.0), 1.0);
    assert!((MAX_SCALE.next_up() * 127.0).is_infinite());
}
