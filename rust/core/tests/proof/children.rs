//! Work in child processes, which may die of it: the parent tells the case at which they did.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::cores;

const JOB: &str = "POLYPRAG_JOB";
const PROGRESS: &str = "POLYPRAG_PROGRESS";
const COUNT: &str = "count: ";
const WIDTH: usize = 200;

/// In a child: what it was told to do.
pub fn job() -> Option<String> {
    std::env::var(JOB).ok()
}

/// In a child: tells the parent how often something was done.
pub fn count(what: &str, n: usize) {
    println!("\n{COUNT}{n} {what}");
}

/// In a child: where it is, for the parent to read if it dies.
#[derive(Debug)]
pub struct Progress(File);

impl Progress {
    pub fn open() -> Self {
        let path = std::env::var_os(PROGRESS).expect("the parent says where");
        Self(File::options().write(true).open(path).unwrap())
    }

    pub fn at(&self, case: &str) {
        let mut line = [b' '; WIDTH];
        for (to, from) in line.iter_mut().zip(case.bytes()) {
            *to = from;
        }
        self.0.write_all_at(&line, 0).unwrap();
    }
}

struct Running {
    job: String,
    child: Child,
    progress: tempfile::NamedTempFile,
    output: std::thread::JoinHandle<String>,
    since: Instant,
}

impl Running {
    /// `test` is the name of an ignored test of this program, which does the work.
    fn start(test: &str, job: String) -> Self {
        let progress = tempfile::NamedTempFile::new().unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                test,
                "--ignored",
                "--nocapture",
                "--test-threads=1",
            ])
            .env(JOB, &job)
            .env(PROGRESS, progress.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (mut out, mut err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        let output = std::thread::spawn(move || {
            let errors = std::thread::spawn(move || {
                let mut text = Vec::new();
                err.read_to_end(&mut text).unwrap();
                text
            });
            let mut text = Vec::new();
            out.read_to_end(&mut text).unwrap();
            text.extend(errors.join().unwrap());
            String::from_utf8_lossy(&text).into_owned()
        });
        Self {
            job,
            child,
            progress,
            output,
            since: Instant::now(),
        }
    }

    /// Whether it has ended; or how it ended otherwise than well, or that it did not in time.
    fn ended(&mut self, limit: Duration) -> Result<bool, String> {
        let case = || std::fs::read_to_string(self.progress.path()).unwrap_or_default();
        match self.child.try_wait().unwrap() {
            Some(status) if status.success() => Ok(true),
            Some(status) => {
                let output = std::mem::replace(&mut self.output, std::thread::spawn(String::new));
                let output = output.join().unwrap();
                let how = match status.signal() {
                    Some(signal) => format!("died of signal {signal}"),
                    None => "failed".into(),
                };
                let case = case();
                Err(format!(
                    "{}: {how} at {}\n{output}",
                    self.job,
                    case.trim_end()
                ))
            }
            None if self.since.elapsed() > limit => {
                let _ = self.child.kill();
                let case = case();
                Err(format!(
                    "{}: still at {} after {limit:?}",
                    self.job,
                    case.trim_end()
                ))
            }
            None => Ok(false),
        }
    }

    fn counts(self) -> Vec<(String, usize)> {
        let output = self.output.join().unwrap();
        let told: Vec<_> = output
            .lines()
            .filter_map(|line| line.strip_prefix(COUNT)?.split_once(' '))
            .map(|(n, what)| (what.to_owned(), n.parse().unwrap()))
            .collect();
        assert!(!told.is_empty(), "{}: it did nothing:\n{output}", self.job);
        told
    }
}

/// Does each job in a child of its own, as many at a time as there are cores, and adds up what they count.
pub fn all(test: &str, jobs: Vec<String>, limit: Duration) -> Vec<(String, usize)> {
    some_at_a_time(cores(), test, jobs, limit)
}

/// As [`all`], and all of them at a time.
pub fn together(test: &str, jobs: Vec<String>, limit: Duration) -> Vec<(String, usize)> {
    some_at_a_time(jobs.len(), test, jobs, limit)
}

fn some_at_a_time(
    most: usize,
    test: &str,
    jobs: Vec<String>,
    limit: Duration,
) -> Vec<(String, usize)> {
    let mut sums: Vec<(String, usize)> = Vec::new();
    let mut waiting = jobs.into_iter();
    let mut running: Vec<Running> = Vec::new();
    let mut failures: Vec<String> = Vec::new();
    loop {
        while running.len() < most
            && let Some(job) = waiting.next()
        {
            running.push(Running::start(test, job));
        }
        if running.is_empty() {
            assert!(failures.is_empty(), "{}", failures.join("\n"));
            return sums;
        }
        for mut one in std::mem::take(&mut running) {
            match one.ended(limit) {
                Ok(false) => running.push(one),
                Err(failure) => failures.push(failure),
                Ok(true) => {
                    for (what, n) in one.counts() {
                        match sums.iter_mut().find(|(w, _)| *w == what) {
                            Some((_, sum)) => *sum += n,
                            None => sums.push((what, n)),
                        }
                    }
                }
            }
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// As `120 openings, 7 flips`.
pub fn told(counts: &[(String, usize)]) -> String {
    let each: Vec<_> = counts
        .iter()
        .map(|(what, n)| format!("{n} {what}"))
        .collect();
    each.join(", ")
}
