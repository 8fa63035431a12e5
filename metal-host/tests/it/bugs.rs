//! Kernels with one mistake each: the ladder finds it, in the build and at the line that are told here.

use std::time::Duration;

use metal_host::{
    Build, Check, Element, Error, Host, Input, Kind, Launch, Output, Source, Template,
};

use crate::support::{file, host, kernel};

/// A kernel and its launch, all in float.
#[derive(Clone)]
struct Case {
    source: Source,
    launch: Launch,
    check: Check,
}

/// One mistake: what is written instead of what, and the text of the line it must be found at.
#[derive(Clone, Copy)]
struct Bug<'a> {
    right: &'a str,
    wrong: &'a str,
    line: &'a str,
}

impl Case {
    fn new(name: &str, x: &[usize], y: &[usize], threads: u32, group: u32) -> Self {
        let source = Source {
            inputs: vec![Input::new("x", Element::F32, x)],
            outputs: vec![Output::new("y", Element::F32, y)],
            ..kernel(name)
        };
        let launch = Launch { grid: [threads, 1, 1], group: [group, 1, 1] };
        Case { source, launch, check: Check::default() }
    }

    fn with(mut self, right: &str, wrong: &str) -> Self {
        let texts = [&mut self.source.header, &mut self.source.body];
        let places: Vec<_> = texts.into_iter().filter(|text| text.contains(right)).collect();
        let [text] = <[_; 1]>::try_from(places).expect("it stands in one of the two");
        assert_eq!(text.matches(right).count(), 1, "{right}");
        assert_eq!(right.lines().count(), wrong.lines().count(), "lines stay where they are");
        *text = text.replace(right, wrong);
        self
    }

    fn check(&self, host: &Host) -> Error {
        let value = |i: usize| (i as f32 + 1.0).to_ne_bytes();
        let bytes = |input: &Input| (0..input.shape.iter().product()).flat_map(value).collect();
        let inputs: Vec<Vec<u8>> = self.source.inputs.iter().map(bytes).collect();
        let inputs: Vec<&[u8]> = inputs.iter().map(Vec::as_slice).collect();
        match host.check(&self.source, self.launch, &inputs, &self.check) {
            Err(error) => error,
            Ok(outputs) => panic!("not found, with outputs of {} bytes", outputs[0].len()),
        }
    }

    /// Asserts that the ladder ends in a finding of this kind, from this build, at `bug.line`.
    fn assert_found(self, bug: Bug<'_>, kind: Kind, build: Build) {
        let Some(host) = host() else { return };
        let case = self.with(bug.right, bug.wrong);
        match case.check(host) {
            Error::Finding(finding) => {
                let report = &finding.report;
                assert_eq!((finding.kind, finding.build), (kind, build), "{finding}\n{report}");
                let place = (finding.place.file.as_str(), finding.place.line);
                let expected = place_of(&case.source, bug.line);
                assert_eq!(place, (expected.0.as_str(), expected.1), "{finding}\n{report}");
            }
            other => panic!("{other}"),
        }
    }

    /// As [`Case::assert_found`], of what the first build is to find, whichever that is.
    fn assert_found_first(self, bug: Bug<'_>, kind: Kind) {
        for first in 0..Build::ALL.len() {
            let mut case = self.clone();
            case.check.builds = Build::ALL[first..].to_vec();
            case.assert_found(bug, kind, Build::ALL[first]);
        }
    }

    /// Asserts that clang refuses it at `bug.line` with a message that has `words`.
    fn assert_refused(self, bug: Bug<'_>, words: &str) {
        let Some(host) = host() else { return };
        let case = self.with(bug.right, bug.wrong);
        match case.check(host) {
            Error::Compile { place, message, report, .. } => {
                let expected = place_of(&case.source, bug.line);
                assert_eq!((place.file, place.line), expected, "{message}\n{report}");
                assert!(message.contains(words), "{message}");
            }
            other => panic!("{other}"),
        }
    }
}

/// The file and line at which a line of the kernel stands, wrong as it now is.
fn place_of(source: &Source, line: &str) -> (String, u32) {
    let (path, text) = file(&source.name);
    let texts = source.header.lines().chain(source.body.lines());
    let directives = |line: &&str| !line.starts_with("#line");
    let helpers = texts.clone().position(|line| line.starts_with("#line")).expect("a directive");
    // As in the file: what precedes its first line is the target's, and the mark between the two is gone.
    let body_line = text.lines().position(|line| line.starts_with("// ---- body")).unwrap() + 1;
    let header: Vec<_> = texts.clone().skip(helpers + 1).take(body_line - 1).collect();
    let body: Vec<_> = source.body.lines().filter(directives).collect();
    let lines = header.into_iter().chain(["the mark"]).chain(body);
    let found: Vec<_> = lines.enumerate().filter(|(_, text)| text.contains(line)).collect();
    assert_eq!(found.len(), 1, "{line} is one line: {found:?}");
    (path, found[0].0 as u32 + 1)
}

fn row_sum() -> Case {
    let mut case = Case::new("row_sum", &[3, 1000], &[3], 384, 128);
    case.source.template = vec![("T".into(), Template::Element(Element::F32))];
    case
}

fn scan() -> Case {
    let mut case = Case::new("scan", &[2, 600], &[2, 600], 128, 128);
    case.launch.grid[1] = 2;
    case
}

/// 64 elements, two groups.
fn copy() -> Case {
    Case::new("copy", &[64], &[64], 64, 32)
}

const COPY: &str = "y[i] = same(x[i]);";

/// A mistake on the one line of [`copy`].
fn line(wrong: &str) -> Bug<'_> {
    Bug { right: COPY, wrong, line: wrong }
}

#[test]
fn a_missing_barrier_is_a_race() {
    let right = "threadgroup_barrier(mem_flags::mem_threadgroup);\nif (lane == 0) {";
    let bug = Bug { right, wrong: "// none\nif (lane == 0) {", line: "partial[simdgroup] = sum;" };
    row_sum().assert_found(bug, Kind::Race, Build::Thread);
}

#[test]
fn a_missing_barrier_in_a_loop_is_a_race() {
    let right = "  threadgroup_barrier(mem_flags::mem_threadgroup);\n  if (place == width - 1) {";
    let wrong = "  // none\n  if (place == width - 1) {";
    let bug = Bug { right, wrong, line: "carry[0] = value;" };
    scan().assert_found(bug, Kind::Race, Build::Thread);
}

#[test]
fn a_barrier_for_no_memory_is_a_race() {
    let scanned =
        "sums[lane] = lane_scan(lane < simdgroups_per_threadgroup ? sums[lane] : 0.0f, lane);";
    let barrier = |flags| format!("{scanned}\n  }}\n  threadgroup_barrier(mem_flags::{flags});");
    let (right, wrong) = (barrier("mem_threadgroup"), barrier("mem_none"));
    let bug = Bug { right: &right, wrong: &wrong, line: "value += carry[0]" };
    scan().assert_found(bug, Kind::Race, Build::Thread);
}

#[test]
fn a_missing_simdgroup_barrier_is_a_race() {
    let wrong = "THREADGROUP_ARRAY(float, t, [32]); t[i % 32] = x[i]; y[i] = t[(i + 1) % 32];";
    copy().assert_found(line(wrong), Kind::Race, Build::Thread);
    // With it, all is well.
    let Some(host) = host() else { return };
    let right = "THREADGROUP_ARRAY(float, t, [32]); t[i % 32] = x[i]; \
        simdgroup_barrier(mem_flags::mem_threadgroup); y[i] = t[(i + 1) % 32];";
    let case = copy().with(COPY, right);
    let x: Vec<u8> = (0..64u32).flat_map(|i| (i as f32).to_ne_bytes()).collect();
    host.check(&case.source, case.launch, &[&x], &case.check).unwrap();
}

#[test]
fn barriers_do_not_order_groups() {
    let wrong = "threadgroup_barrier(mem_flags::mem_device); y[i % 32] = x[i % 32]; y[i] = x[i]; \
        threadgroup_barrier(mem_flags::mem_device);";
    copy().assert_found(line(wrong), Kind::Race, Build::Thread);
}

#[test]
fn groups_that_write_one_element_race() {
    copy().assert_found(
        line("y[i % 32] = x[i]; y[32 + i % 32] = x[i];"),
        Kind::Race,
        Build::Thread,
    );
}

#[test]
fn a_sum_that_is_not_atomic_is_a_race() {
    let mut case = copy();
    case.check.init_value = Some(0.0);
    case.assert_found(line("y[0] += x[i];"), Kind::Race, Build::Thread);
}

#[test]
fn a_read_behind_the_input_is_found() {
    let right = "sum += static_cast<float>(row[c]);";
    let wrong = "sum += static_cast<float>(row[c + 1]);";
    row_sum().assert_found(Bug { right, wrong, line: wrong }, Kind::Address, Build::Address);
}

#[test]
fn a_write_behind_a_threadgroup_array_is_found() {
    let (right, wrong) = ("partial[simdgroup] = sum;", "partial[32 + simdgroup] = sum;");
    row_sum().assert_found(Bug { right, wrong, line: wrong }, Kind::Address, Build::Address);
}

#[test]
fn a_misaligned_vector_is_undefined() {
    let wrong =
        "float4 v = *reinterpret_cast<const device float4*>(x + min(i, 60u)); y[i] = v.x + v.w;";
    copy().assert_found(line(wrong), Kind::Undefined, Build::Address);
}

#[test]
fn a_shift_by_the_width_is_undefined() {
    copy().assert_found(line("y[i] = 1u << (i + 1);"), Kind::Undefined, Build::Address);
}

#[test]
fn a_sum_over_memory_that_nothing_wrote_is_found() {
    let bug = Bug {
        right: "  partial[lane] = 0;",
        wrong: "  // none",
        line: "sum = simd_sum(partial[lane]);",
    };
    row_sum().assert_found(bug, Kind::Uninitialised, Build::Memory);
}

#[test]
fn a_decision_on_memory_that_nothing_wrote_is_found() {
    let (right, wrong) = ("  partial[lane] = 0;", "  if (partial[lane] < 0) partial[lane] = 0;");
    row_sum().assert_found(Bug { right, wrong, line: wrong }, Kind::Uninitialised, Build::Memory);
}

#[test]
fn a_private_array_that_nothing_wrote_is_found() {
    let wrong = "float t[4]; t[0] = 1; y[i] = t[uint(x[i]) & 3];";
    copy().assert_found(line(wrong), Kind::Uninitialised, Build::Memory);
}

#[test]
fn an_element_that_is_not_written_is_found() {
    // Nothing is done wrong at any line, so the body's first is named.
    let bug = Bug { right: COPY, wrong: "if (i < 63) y[i] = x[i];", line: "const uint i = " };
    copy().assert_found(bug, Kind::Unwritten, Build::Memory);
}

#[test]
fn a_barrier_that_some_threads_miss_is_divergence() {
    let right = "if (lane == 0) {\n  partial[simdgroup] = sum;";
    let wrong =
        "if (lane == 0) {\n  threadgroup_barrier(mem_flags::mem_none); partial[simdgroup] = sum;";
    let line = "mem_none); partial";
    row_sum().assert_found_first(Bug { right, wrong, line }, Kind::Divergence);
}

#[test]
fn a_return_before_a_simdgroup_function_is_divergence() {
    let (right, wrong) = ("sum = simd_sum(sum);", "if (lane > 15) return; sum = simd_sum(sum);");
    row_sum().assert_found(Bug { right, wrong, line: wrong }, Kind::Divergence, Build::Plain);
}

#[test]
fn a_return_before_a_barrier_is_divergence() {
    let right = "threadgroup_barrier(mem_flags::mem_threadgroup);\nif (lane == 0) {";
    let wrong = "if (simdgroup == 3) return; threadgroup_barrier(mem_flags::mem_threadgroup);\nif (lane == \
        0) {";
    let bug = Bug { right, wrong, line: "if (simdgroup == 3) return;" };
    row_sum().assert_found(bug, Kind::Divergence, Build::Plain);
}

#[test]
fn more_threadgroup_memory_than_there_is_is_found() {
    let wrong = "THREADGROUP_ARRAY(float, big, [8193]); big[i] = x[i]; y[i] = big[i];";
    copy().assert_found(line(wrong), Kind::ThreadgroupMemory, Build::Plain);
}

#[test]
fn an_output_that_depends_on_who_comes_first_is_found() {
    let mut case = copy();
    case.launch.group = [64, 1, 1];
    let wrong = "THREADGROUP_ARRAY(atomic_uint, n, [1]); if (i == 0) atomic_store_explicit(n, 0u, \
        memory_order_relaxed); threadgroup_barrier(mem_flags::mem_threadgroup); \
        y[atomic_fetch_add_explicit(n, 1u, memory_order_relaxed)] = x[i];";
    let bug = Bug { right: COPY, wrong, line: "const uint i = " };
    case.assert_found_first(bug, Kind::ScheduleDependent);
}

#[test]
fn a_thread_that_waits_for_another_runs_out_of_time() {
    let mut case = copy();
    case.check.time_limit = Duration::from_millis(300);
    let wrong = "THREADGROUP_ARRAY(atomic_uint, n, [1]); while (atomic_load_explicit(n, \
        memory_order_relaxed) != 1u) {} y[i] = x[i];";
    let bug = Bug { right: COPY, wrong, line: "const uint i = " };
    case.assert_found(bug, Kind::TimeOut, Build::Plain);
}

#[test]
fn more_private_memory_than_a_stack_has_is_a_crash() {
    // Plain it crashes without a word; ThreadSanitizer is the first whose stacks are as small.
    let wrong =
        "volatile float t[60000]; for (uint k = 0; k < 60000; k++) t[k] = x[i]; y[i] = t[i];";
    copy().assert_found(line(wrong), Kind::Crash, Build::Thread);
}

#[test]
fn address_spaces_are_kept_apart() {
    let right = "inline float same(float value) { return value; }";
    let refused = |helper: &'static str| {
        let case = copy().with(COPY, "y[i] = first(x);");
        case.assert_refused(
            Bug { right, wrong: helper, line: "y[i] = first(x);" },
            "no matching function",
        );
    };
    refused("inline float first(threadgroup float* p) { return p[0]; }");
    refused("inline float first(const threadgroup float* p) { return p[0]; }");
    refused("inline float first(const float* p) { return p[0]; }");
}

#[test]
fn what_metal_refuses_is_refused() {
    for (wrong, words) in [
        ("x[i] = 1;", "read-only"),
        ("bfloat16_t b = x[i]; y[i] = b;", "implicit conversion"),
        ("y[i] = max(i, 1);", "ambiguous"),
        ("y[i] = simd_sum(ulong(i));", "no matching function"),
        ("threadgroup_barrier(); y[i] = x[i];", "no matching function"),
        ("float4 v = int4(1); y[i] = v.x;", "cannot initialize"),
        ("y[i] = float4(1, 2, 3).x;", "wrong number of vector components"),
        ("y[i] = x[i] y[i];", "expected ';'"),
    ] {
        copy().assert_refused(line(wrong), words);
    }
}
