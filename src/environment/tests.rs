use super::*;
use crate::Status;

#[test]
fn a_switch_is_on_or_off_or_refused() {
    for value in ["1", "true", "yes", "on", "TRUE", "On"] {
        assert_eq!(parse_switch("PFC_X", value), Ok(true), "{value}");
    }
    for value in ["", "0", "false", "no", "off", "FALSE", "Off"] {
        assert_eq!(parse_switch("PFC_X", value), Ok(false), "{value}");
    }
    for value in ["2", "enabled", " 1", "y", "-1", "\u{fffd}"] {
        let refused = parse_switch("PFC_X", value).unwrap_err();
        assert_eq!(refused.status, Status::InvalidArgument);
        assert!(refused.message.starts_with("PFC_X must be 1, true") && refused.message.ends_with(&format!("got {value:?}")));
    }
}
