//! Which machine to compute on.
//!
//! A GPU is looked for when the program runs, not when it is built. `auto` takes
//! the first GPU, and the processor only where there is none: a GPU that is there
//! but cannot be used is an error with its remedy, since training on the processor
//! unasked would be found out hours later.

use std::fmt;
use std::str::FromStr;

use crate::cuda::{Cuda, Nvidia};
use crate::nf4::Nf4Tensor;
use crate::{Backend, Cpu, HostMatrix, Result};

/// What was asked for: `auto`, `cpu`, `cuda` or `cuda:N`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Choice {
    /// The first GPU, or the processor if there is none.
    #[default]
    Auto,
    /// The processor.
    Cpu,
    /// The GPU of this number.
    Cuda(usize),
}

impl FromStr for Choice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => text
                .strip_prefix("cuda:")
                .and_then(|number| number.parse().ok())
                .map(Self::Cuda)
                .ok_or_else(|| format!("{text:?} is no device: auto, cpu or cuda:N")),
        }
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(number) => write!(f, "cuda:{number}"),
        }
    }
}

/// A machine that is ready.
pub enum Device {
    /// The processor.
    Cpu(Cpu),
    /// A GPU.
    Cuda(Cuda),
}

impl Device {
    /// Opens what was asked for. The second value says in words what was taken and
    /// why, for the log.
    ///
    /// # Errors
    /// If the GPU that was asked for, or that `auto` found, cannot be used.
    pub fn open(choice: Choice) -> Result<(Self, String)> {
        let number = match choice {
            Choice::Cpu => return Ok(Self::cpu("as asked")),
            Choice::Cuda(number) => number,
            Choice::Auto => match Nvidia::count()? {
                0 => return Ok(Self::cpu("no NVIDIA GPU was found")),
                _ => 0,
            },
        };
        let cuda = Cuda::new(Box::new(Nvidia::open(number)?))?;
        let words = match choice {
            Choice::Auto => format!("{} (the first GPU)", cuda.describe()),
            _ => format!("{} (as asked)", cuda.describe()),
        };
        Ok((Self::Cuda(cuda), words))
    }

    /// What the last bits of a result hang on beside the backend: a GPU's chip, driver and
    /// cuBLAS. On the processor nothing.
    pub fn hardware(&self) -> Option<String> {
        match self {
            Self::Cpu(_) => None,
            Self::Cuda(cuda) => Some(cuda.hardware()),
        }
    }

    /// A weight in NF4, computed here: [`Backend::quantize`].
    ///
    /// # Errors
    /// If a value is not finite, or the device has no room.
    pub fn quantize(&self, matrix: &HostMatrix) -> Result<Nf4Tensor> {
        match self {
            Self::Cpu(cpu) => cpu.quantize(matrix),
            Self::Cuda(cuda) => cuda.quantize(matrix),
        }
    }

    fn cpu(why: &str) -> (Self, String) {
        (Self::Cpu(Cpu), format!("{} ({why})", Cpu.describe()))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn choices_read_as_they_print() {
        for text in ["auto", "cpu", "cuda:0", "cuda:3"] {
            assert_eq!(text.parse::<Choice>().unwrap().to_string(), text);
        }
        assert_eq!("cuda".parse(), Ok(Choice::Cuda(0)));
        for wrong in ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "CPU"] {
            assert!(wrong.parse::<Choice>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_gpu_that_is_not_there_is_an_error_with_a_remedy() {
        let Err(error) = Device::open(Choice::Cuda(99)) else {
            panic!("there is no machine with a hundred GPUs");
        };
        assert!(error.to_string().contains("--device cpu"), "{error}");
        let (_, words) = Device::open(Choice::Cpu).unwrap();
        assert!(words.contains("CPU"), "{words}");
    }
}
