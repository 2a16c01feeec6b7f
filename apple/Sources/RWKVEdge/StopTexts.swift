/// Watches a stream of text for the first of some stop texts, and holds back what may be the beginning of one.
///
/// It compares UTF-8: Swift's characters would join a newline with a carriage return before it, and a letter with an accent
/// after it.
struct StopTexts {
    private let stops: [[UInt8]]
    private var held: [UInt8] = []

    init(_ stops: [String]) throws {
        guard !stops.contains(where: \.isEmpty) else {
            throw RWKVError.input("A stop text is empty.")
        }
        self.stops = stops.map { Array($0.utf8) }
    }

    var isHolding: Bool { !held.isEmpty }

    /// Take text; give what is certain now, and whether a stop has come.
    mutating func push(_ text: String) -> (text: String, stopped: Bool) {
        held += Array(text.utf8)
        if let first = stops.compactMap({ Self.place(of: $0, in: held) }).min() {
            let before = String(decoding: held[..<first], as: UTF8.self)
            held = []
            return (before, true)
        }
        var n = 0  // bytes at the end that a stop begins with
        for stop in stops {
            for k in stride(from: min(stop.count - 1, held.count), to: n, by: -1) where held.suffix(k).elementsEqual(stop.prefix(k)) {
                n = k
                break
            }
        }
        let certain = String(decoding: held.dropLast(n), as: UTF8.self)
        held = Array(held.suffix(n))
        return (certain, false)
    }

    /// Give what is held back.
    mutating func finish() -> String {
        defer { held = [] }
        return String(decoding: held, as: UTF8.self)
    }

    private static func place(of stop: [UInt8], in text: [UInt8]) -> Int? {
        guard stop.count <= text.count else { return nil }
        return (0...text.count - stop.count).first { text[$0..<$0 + stop.count].elementsEqual(stop) }
    }
}
