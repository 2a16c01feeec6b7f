/// Reads the Python literals of a World vocabulary: `'text'`, `"text"` and `b'bytes'`, with escapes.
enum PythonLiteral {
    /// The bytes of a literal, those of text as UTF-8. Nil if it is none.
    static func bytes(of literal: ArraySlice<UInt8>) -> [UInt8]? {
        var rest = literal
        let isBytes = rest.first == UInt8(ascii: "b")
        if isBytes { rest = rest.dropFirst() }
        guard rest.count >= 2, let quote = rest.first, quote == UInt8(ascii: "'") || quote == UInt8(ascii: "\""), rest.last == quote else {
            return nil
        }
        rest = rest.dropFirst().dropLast()
        var bytes: [UInt8] = []
        while let byte = rest.popFirst() {
            if byte == quote || (isBytes && byte >= 0x80) { return nil }
            guard byte == UInt8(ascii: "\\") else {
                bytes.append(byte)
                continue
            }
            guard let escaped = rest.popFirst() else { return nil }
            switch escaped {
            case UInt8(ascii: "\\"), UInt8(ascii: "'"), UInt8(ascii: "\""): bytes.append(escaped)
            case UInt8(ascii: "a"): bytes.append(0x07)
            case UInt8(ascii: "b"): bytes.append(0x08)
            case UInt8(ascii: "t"): bytes.append(0x09)
            case UInt8(ascii: "n"): bytes.append(0x0A)
            case UInt8(ascii: "v"): bytes.append(0x0B)
            case UInt8(ascii: "f"): bytes.append(0x0C)
            case UInt8(ascii: "r"): bytes.append(0x0D)
            case UInt8(ascii: "x"):
                guard let value = hex(2, &rest) else { return nil }
                if isBytes {
                    bytes.append(UInt8(truncatingIfNeeded: value))
                } else {
                    guard append(value, &bytes) else { return nil }
                }
            case UInt8(ascii: "u") where !isBytes:
                guard let value = hex(4, &rest), append(value, &bytes) else { return nil }
            case UInt8(ascii: "U") where !isBytes:
                guard let value = hex(8, &rest), append(value, &bytes) else { return nil }
            default: return nil  // octal escapes and names: repr writes none
            }
        }
        return bytes
    }

    /// The value of so many hexadecimal digits.
    private static func hex(_ n: Int, _ rest: inout ArraySlice<UInt8>) -> UInt32? {
        let digits = rest.prefix(n)
        rest = rest.dropFirst(n)
        guard digits.count == n, digits.allSatisfy({ $0 != UInt8(ascii: "+") && $0 != UInt8(ascii: "-") }) else { return nil }
        return UInt32(String(decoding: digits, as: UTF8.self), radix: 16)
    }

    /// Append a character as UTF-8; false if it is none.
    private static func append(_ value: UInt32, _ bytes: inout [UInt8]) -> Bool {
        guard let scalar = Unicode.Scalar(value) else { return false }
        bytes.append(contentsOf: Array(String(scalar).utf8))
        return true
    }
}
