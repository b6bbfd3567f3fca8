use super::*;

#[test]
fn versions_read_as_nccl_writes_them() {
    assert_eq!(Version(23203).to_string(), "2.32.3");
    assert_eq!(Version(LEAST_VERSION).to_string(), "2.18.0");
}
