//! The code that talks to NVIDIA's libraries, against stand-ins for them.

use std::process::{Command, Output};

use cuda_on_cpu::STAND_IN;
use engine::{Backend, Choice, Device, HostMatrix, Neftune, Ragged, Reading};
use half::bf16;

use crate::support::{ONLY_GPU, UNFIT, UNRECORDING, gpu, only_gpu};

/// A command that finds these folders' libraries, and no others.
fn with(mut command: Command, folders: &[&str], unfit: &str) -> Output {
    command
        .env("LD_LIBRARY_PATH", folders.join(":"))
        .env(UNFIT, unfit)
        .env_remove("VIRTUAL_ENV")
        .env_remove("CONDA_PREFIX")
        .env("HOME", "/nonexistent")
        .output()
        .unwrap()
}

/// Names the device that a child shall open.
const OPEN: &str = "CUDA_TESTS_OPEN";

/// In a child: opens a device as the tools do, brings it a table, and says what came
/// of it.
#[test]
fn the_child_opens_a_device() {
    let Ok(choice) = std::env::var(OPEN) else {
        return;
    };
    let opened = choice
        .parse::<Choice>()
        .and_then(|choice| Device::open(choice).map_err(|e| e.to_string()))
        .and_then(|(device, words)| match device {
            Device::Cpu(_) => Ok(words),
            Device::Cuda(cuda) => {
                let table = HostMatrix::bf16(1, 8, vec![bf16::ONE; 8]);
                let uploaded = cuda.upload_table(table).map_err(|e| e.to_string());
                uploaded.map(|_| words)
            }
        });
    match opened {
        Ok(words) => println!("opened: {words}"),
        Err(problem) => println!("refused: {problem}"),
    }
}

/// Whether a device opens, and what is said.
fn open(choice: &str, folders: &[&str], unfit: &str) -> (bool, String) {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child
        .args(["--exact", "nvidia::the_child_opens_a_device", "--nocapture"])
        .env(OPEN, choice);
    let output = with(child, folders, unfit);
    assert!(
        output.status.success() && output.stderr.is_empty(),
        "{output:?}"
    );
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let (opened, refused) = (text.contains("opened: "), text.contains("refused: "));
    assert!(opened != refused, "{text}");
    (opened, text)
}

#[test]
fn kernels_and_training_through_the_real_driver_layer() {
    if only_gpu() {
        return; // the child itself
    }
    let mut tests = Command::new(std::env::current_exe().unwrap());
    tests
        .args(["kernels::", "model::training", "--nocapture"])
        .env(ONLY_GPU, "1");
    let output = with(tests, &STAND_IN, "");
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "{text}");
    // Not by having run nothing.
    let ran = text.matches("cuda:0 stand-in, bf16: ").count();
    assert!(ran > 50, "{ran} comparisons\n{text}");
}

/// Wherever recording fails, the work goes one by one.
#[test]
fn replies_are_the_same_where_nothing_can_be_recorded() {
    if only_gpu() {
        return;
    }
    let generated = |unfit| {
        let mut test = Command::new(std::env::current_exe().unwrap());
        let name = "model::steps_of_several_sizes_are_recorded";
        test.args(["--exact", name, "--nocapture"])
            .env(ONLY_GPU, "1");
        let output = with(test, &STAND_IN, unfit);
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert!(output.status.success(), "{text}");
        let line = |what| text.lines().find_map(|line| line.strip_prefix(what));
        let played: usize = line("played: ").unwrap().parse().unwrap();
        let why = line("unrecorded: ").unwrap().to_owned();
        (line("replies: ").unwrap().to_owned(), played, why)
    };
    let (replies, played, why) = generated("");
    assert!(played > 3 && why == "None", "{played}, {why}");
    for unfit in UNRECORDING {
        let (one_by_one, played, why) = generated(unfit);
        assert_eq!((&one_by_one, played), (&replies, 0), "{unfit}");
        assert!(
            why.contains("recording work that comes again: "),
            "{unfit}: {why}"
        );
    }
}

/// In a child whose GPU refuses a launch: what was asked for before comes all the same. A
/// checkpoint is on its way to the disk while the next step is queued.
#[test]
fn what_was_asked_for_before_a_failure_is_read() {
    if std::env::var(UNFIT).as_deref() != Ok("stumbling") {
        if only_gpu() {
            return;
        }
        let mut child = Command::new(std::env::current_exe().unwrap());
        let name = "nvidia::what_was_asked_for_before_a_failure_is_read";
        child.args(["--exact", name, "--nocapture"]);
        let output = with(child, &STAND_IN, "stumbling");
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert!(
            output.status.success() && text.contains("1 passed"),
            "{text}"
        );
        return;
    }
    let cuda = gpu().unwrap();
    let (rows, width) = (Ragged::new(&cuda, &[(0, 4)]).unwrap(), 8);
    let figures = cuda.upload_f32(&[1.5, -2.0]).unwrap();
    let before = cuda.read_f32(&figures, 0..2);
    let mut x = cuda.alloc_act(4 * width).unwrap();
    cuda.add_noise(
        &Neftune {
            seed: 1,
            step: 1,
            alpha: 5.0,
        },
        &rows,
        width,
        &mut x,
    );
    let after = cuda.read_f32(&figures, 0..2);
    assert_eq!(before.wait().unwrap(), [1.5, -2.0]);
    let problem = after.wait().unwrap_err().to_string();
    assert!(problem.contains("add_noise"), "{problem}");
}

#[test]
fn what_is_missing_or_too_old_is_said_with_its_remedy() {
    let [driver, cublas] = STAND_IN;
    // Nothing here at all: the processor, or an error for who asked for a GPU.
    if gpu().is_none() {
        let (fine, words) = open("auto", &[], "");
        assert!(
            fine && words.contains("CPU") && words.contains("no NVIDIA GPU"),
            "{words}"
        );
        let (fine, words) = open("cuda:0", &[], "");
        assert!(!fine && words.contains("--device cpu"), "{words}");
    }
    let (fine, words) = open("auto", &[driver, cublas], "");
    assert!(
        fine && words.contains("cuda:0 stand-in") && words.contains("first GPU"),
        "{words}"
    );
    // An old driver is nobody's trouble where it has no GPU.
    for unfit in ["none", "old, none"] {
        let (fine, words) = open("auto", &[driver, cublas], unfit);
        assert!(fine && words.contains("no NVIDIA GPU was found"), "{words}");
    }
    for (choice, unfit, says) in [
        ("auto", "old", "driver to version 550"),
        ("cuda:0", "old", "supports CUDA 12.2"),
        ("cuda:1", "", "there is no GPU 1: 1 found"),
        ("cuda:0", "none", "there is no GPU 0: 0 found"),
        ("cuda:0", "old, none", "there is no GPU 0: 0 found"),
        ("auto", "ancient", "compute capability 7.5"),
        ("auto", "poolless", "has no memory pools"),
        ("cuda", "full", "out of memory"),
        // Not on the device instead: nobody has planned it there.
        ("auto", "crowded", "page-locked host memory, for embeddings"),
        ("cuda", "swamped", "page-locked host memory, for copies"),
        ("cuda:x", "", "no device"),
    ] {
        let (fine, words) = open(choice, &[driver, cublas], unfit);
        assert!(!fine && words.contains(says), "{choice} {unfit}: {words}");
    }
    let (fine, words) = open("auto", &[driver], "");
    assert!(
        fine || words.contains("pip install nvidia-cublas"),
        "{words}"
    );
}
