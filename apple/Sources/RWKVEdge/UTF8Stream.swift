/// Decodes UTF-8 as it comes, in pieces that end anywhere.
struct UTF8Stream {
    /// The beginning of a character whose other bytes are still to come.
    private(set) var pending: [UInt8] = []

    /// Take bytes and give the text that is now whole; bytes that are no UTF-8 become U+FFFD.
    mutating func push(_ bytes: [UInt8]) -> String {
        let all = pending + bytes
        let whole = all.count - Self.unfinished(all)
        pending = Array(all[whole...])
        return String(decoding: all[..<whole], as: UTF8.self)
    }

    /// Give what is held back: U+FFFD for an unfinished character.
    mutating func finish() -> String {
        defer { pending = [] }
        return String(decoding: pending, as: UTF8.self)
    }

    /// How many bytes at the end may be the beginning of a character.
    static func unfinished(_ bytes: [UInt8]) -> Int {
        for n in 1...3 where n <= bytes.count {
            let lead = bytes[bytes.count - n]
            if lead & 0xC0 == 0x80 { continue }  // a later byte of a character: look further back
            let length: Int
            switch lead {
            case 0xC2...0xDF: length = 2
            case 0xE0...0xEF: length = 3
            case 0xF0...0xF4: length = 4
            default: return 0
            }
            guard n < length else { return 0 }
            if n == 1 { return 1 }
            // After some leads the second byte has a narrower range: what is out of it will never be a character. Surrogates
            // (ED, A0 to BF) will not either, but Python waits for their third byte, and then gives the same text.
            let second = bytes[bytes.count - n + 1]
            let range: ClosedRange<UInt8>
            switch lead {
            case 0xE0: range = 0xA0...0xBF
            case 0xF0: range = 0x90...0xBF
            case 0xF4: range = 0x80...0x8F
            default: range = 0x80...0xBF
            }
            return range.contains(second) ? n : 0
        }
        return 0
    }
}
