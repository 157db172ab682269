//! numpy arrays: views into a store that keep it mapped, and fresh arrays.

use bytemuck::Pod;
use half::f16;
use numpy::ndarray::{ArrayView, IxDyn};
use numpy::{
    Element, PyArray1, PyArrayDyn, PyArrayMethods, PyReadonlyArrayDyn, PyUntypedArray,
    PyUntypedArrayMethods,
};
use polyprag_core::{Dtype, ExpertTensor, RouteArray, Tensor, TensorView};
use pyo3::prelude::*;
use pyo3::types::PyMapping;

use crate::errors::invalid;

/// What a view has as its base: it keeps the file mapped.
#[pyclass(frozen, module = "polyprag._polyprag")]
#[derive(Debug)]
struct Mapped {
    view: TensorView,
}

/// A read-only array over the mapped file, without a copy; of float32.
pub fn view(py: Python<'_>, view: TensorView) -> PyResult<Bound<'_, PyAny>> {
    typed_view::<f32>(Bound::new(py, Mapped { view })?)
}

/// A read-only array: of float32 and float16 over the mapped file, of the others their numbers as float32.
pub fn expert(py: Python<'_>, tensor: ExpertTensor) -> PyResult<Bound<'_, PyAny>> {
    let mapped = |view| Bound::new(py, Mapped { view });
    match tensor.raw.dtype {
        Dtype::F32 => typed_view::<f32>(mapped(tensor.raw)?),
        Dtype::F16 => typed_view::<f16>(mapped(tensor.raw)?),
        Dtype::Bf16 | Dtype::Int8 => {
            let numbers = py.detach(|| tensor.to_f32());
            let array = PyArray1::from_vec(py, numbers).reshape(IxDyn(&tensor.raw.shape))?;
            Ok(array.readwrite().make_nonwriteable().as_any().clone())
        }
    }
}

fn typed_view<T: Pod + Element>(owner: Bound<'_, Mapped>) -> PyResult<Bound<'_, PyAny>> {
    let py = owner.py();
    let TensorView { name, shape, .. } = &owner.get().view;
    let numbers: &[T] = bytemuck::try_cast_slice(owner.get().view.bytes())
        .map_err(|error| invalid(py, format!("{name}: {error}")))?;
    let array = ArrayView::from_shape(IxDyn(shape), numbers)
        .map_err(|error| invalid(py, format!("{name}: {error}")))?;
    // SAFETY: the memory belongs to the map that `owner` holds for as long as it lives; `owner` is
    // immutable, becomes the base of the array, and is never given a new map.
    #[allow(unsafe_code)]
    let array = unsafe { PyArrayDyn::<T>::borrow_from_array(&array, owner.clone().into_any()) };
    // The map is read-only: a write would end the process.
    let array = array.readwrite().make_nonwriteable();
    Ok(array.as_any().clone())
}

/// An array of its own.
pub fn fresh(py: Python<'_>, array: RouteArray) -> PyResult<Bound<'_, PyArrayDyn<f32>>> {
    PyArray1::from_vec(py, array.data).reshape(IxDyn(&array.shape))
}

/// An array that a caller gave, C order, of a dtype that experts may be given in.
#[derive(Debug)]
pub enum Given<'py> {
    F32(PyReadonlyArrayDyn<'py, f32>),
    F16(PyReadonlyArrayDyn<'py, f16>),
}

impl Given<'_> {
    pub fn dtype(&self) -> Dtype {
        match self {
            Given::F32(_) => Dtype::F32,
            Given::F16(_) => Dtype::F16,
        }
    }

    pub fn shape(&self) -> &[usize] {
        match self {
            Given::F32(array) => array.shape(),
            Given::F16(array) => array.shape(),
        }
    }

    /// The numbers in memory, which is little endian.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Given::F32(array) => array.as_slice().map_or(&[], bytemuck::cast_slice),
            Given::F16(array) => array.as_slice().map_or(&[], bytemuck::cast_slice),
        }
    }
}

/// A float32 or float16 array as it is, or its copy in C order.
pub fn given<'py>(what: &str, value: &Bound<'py, PyAny>) -> PyResult<Given<'py>> {
    let py = value.py();
    let Ok(array) = value.cast::<PyUntypedArray>() else {
        let kind = value.get_type();
        return Err(invalid(
            py,
            format!("{what}: expected a numpy array, got {kind}"),
        ));
    };
    let ordered = contiguous(array, None::<&str>)?;
    if let Ok(array) = ordered.cast::<PyArrayDyn<f32>>() {
        return Ok(Given::F32(array.readonly()));
    }
    if let Ok(array) = ordered.cast::<PyArrayDyn<f16>>() {
        return Ok(Given::F16(array.readonly()));
    }
    Err(invalid(
        py,
        format!("{what}: expected float32 or float16, got {}", array.dtype()),
    ))
}

/// As [`float32`].
pub fn given_float32<'py>(what: &str, value: &Bound<'py, PyAny>) -> PyResult<Given<'py>> {
    float32(what, value).map(Given::F32)
}

/// The arrays of a mapping, each taken by `take`, which is told what to call it.
pub fn named<'py>(
    what: &str,
    mapping: &Bound<'py, PyAny>,
    take: impl Fn(&str, &Bound<'py, PyAny>) -> PyResult<Given<'py>>,
) -> PyResult<Vec<(String, Given<'py>)>> {
    let Ok(mapping) = mapping.cast::<PyMapping>() else {
        let kind = mapping.get_type();
        return Err(invalid(
            mapping.py(),
            format!("{what}: expected a mapping of names to arrays, got {kind}"),
        ));
    };
    let mut arrays = Vec::new();
    for item in mapping.items()?.iter() {
        let (name, array): (String, Bound<'_, PyAny>) = item.extract()?;
        let array = take(&format!("{what}[{name:?}]"), &array)?;
        arrays.push((name, array));
    }
    Ok(arrays)
}

/// Named arrays as the core takes them.
pub fn tensors<'a>(arrays: &'a [(String, Given<'_>)]) -> Vec<Tensor<'a>> {
    let tensors = arrays.iter().map(|(name, array)| Tensor {
        name: name.clone(),
        dtype: array.dtype(),
        shape: array.shape().to_vec(),
        data: array.bytes(),
    });
    tensors.collect()
}

/// An array of floating point numbers as float32 in C order; a copy only where it must be.
pub fn float32<'py>(
    what: &str,
    value: &Bound<'py, PyAny>,
) -> PyResult<PyReadonlyArrayDyn<'py, f32>> {
    let py = value.py();
    let Ok(array) = value.cast::<PyUntypedArray>() else {
        let kind = value.get_type();
        return Err(invalid(
            py,
            format!("{what}: expected a numpy array of float32, got {kind}"),
        ));
    };
    let kind: String = array.dtype().getattr("kind")?.extract()?;
    if kind != "f" {
        return Err(invalid(
            py,
            format!("{what}: expected float32, got {}", array.dtype()),
        ));
    }
    let ordered = contiguous(array, "float32")?;
    Ok(ordered.cast::<PyArrayDyn<f32>>()?.readonly())
}

/// The array itself, or its copy in C order, aligned and of another dtype.
pub fn contiguous<'py>(
    array: &Bound<'py, PyUntypedArray>,
    dtype: impl IntoPyObject<'py>,
) -> PyResult<Bound<'py, PyAny>> {
    let py = array.py();
    // In C order, aligned, and no subclass.
    py.import("numpy")?
        .call_method1("require", (array, dtype, ["C", "A", "E"]))
}
