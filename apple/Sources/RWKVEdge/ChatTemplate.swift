import Foundation

/// How a model was taught to chat: docs/bundle.md, "Chat templates".
public struct ChatTemplate: Decodable, Sendable, Equatable {
    public let system: String
    public let user: String
    public let assistant: String
    public let turnEnd: String
    /// Texts that end a reply: give them to `generate`.
    public let stop: [String]
    /// What becomes of blank lines in a message.
    public let blankLines: BlankLines
    /// Ways of answering; `none` is always there.
    public let think: [String: Thinking]

    public struct Thinking: Decodable, Sendable, Equatable {
        /// What the reply is made to begin with.
        public let opening: String
        /// Of this way of answering; nil for the bundle's.
        public let sampling: Sampling?
    }

    public enum BlankLines: String, Decodable, Sendable {
        /// They stay: the template's turns end otherwise.
        case keep
        /// They would end the turn: a run of them becomes one line break.
        case collapse
    }

    enum CodingKeys: String, CodingKey {
        case system, user, assistant, stop, think
        case turnEnd = "turn_end"
        case blankLines = "blank_lines"
    }

    /// What is read before an answer.
    public struct Turn: Sendable, Equatable {
        /// Of the template at even places, a message at odd ones.
        var pieces = [""]

        /// All of it, as one text.
        public var text: String { pieces.joined() }

        mutating func fill(_ template: String, _ message: String) {
            let parts = template.components(separatedBy: "{}")
            pieces[pieces.count - 1] += parts[0]
            pieces += [message, parts.dropFirst().joined(separator: "{}")]
        }

        mutating func add(_ template: String) {
            pieces[pieces.count - 1] += template
        }

        /// Give the ids: those of the whole text, as long as its special tokens are the template's. docs/bundle.md, "Chat templates".
        func encode(_ tokenizer: any TextTokenizer) throws -> [Int] {
            func isOrdinary(_ text: String) throws -> Bool {
                try tokenizer.encode(text) == tokenizer.encode(text, specialTokens: false)
            }
            let templates = pieces.enumerated().filter { $0.offset % 2 == 0 }.map(\.element)
            let messages = pieces.enumerated().filter { $0.offset % 2 == 1 }.map(\.element)
            let (ids, ordinary) = (try tokenizer.encode(text), try tokenizer.encode(text, specialTokens: false))
            if try templates.allSatisfy(isOrdinary) { return ordinary }
            let apart = try pieces.enumerated().flatMap { try tokenizer.encode($0.element, specialTokens: $0.offset % 2 == 0) }
            let candidates = Set(ids).union(apart).subtracting(ordinary)
            let special = try candidates.filter { try !isOrdinary(tokenizer.decode([$0])) }
            let isSame = ids.filter { special.contains($0) } == apart.filter { special.contains($0) }
            return try isSame && messages.allSatisfy(isOrdinary) ? ids : apart
        }
    }

    /// Give what to read before the model answers: to `RWKVModel.generate(turn:)`.
    ///
    /// - Parameters:
    ///   - message: what a person says
    ///   - system: what the model is told at the start; nil later on
    ///   - isFirst: whether nothing was said before
    ///   - thinking: one of `think`
    public func turn(_ message: String, system: String? = nil, isFirst: Bool, thinking: String = "none") throws -> Turn {
        guard let way = think[thinking] else {
            let known = think.keys.sorted().joined(separator: ", ")
            throw RWKVError.input("The way of thinking \(thinking) is unknown: the bundle has \(known).")
        }
        var turn = Turn()
        if !isFirst {
            turn.add(turnEnd)
        } else if let system, !system.isEmpty {
            turn.fill(self.system, Self.message(system, blankLines))
        }
        turn.fill(user, Self.message(message, blankLines))
        turn.add(assistant + way.opening)
        return turn
    }

    private struct Line {
        var text: ArraySlice<Unicode.Scalar>
        /// The line break after it; none after the last.
        var end: [Unicode.Scalar]

        var isBlank: Bool { text.allSatisfy(\.properties.isWhitespace) }
    }

    /// A message as the model reads it: docs/bundle.md, "Chat templates". By scalars, for Swift's characters join some of them.
    static func message(_ text: String, _ blankLines: BlankLines) -> String {
        var kept: [Line] = []
        for line in lines(of: text) {
            if line.isBlank, kept.isEmpty { continue }
            if line.isBlank, blankLines == .collapse {
                kept[kept.count - 1].end = ["\n"]
            } else {
                kept.append(line)
            }
        }
        while kept.last?.isBlank == true { kept.removeLast() }
        guard var last = kept.popLast() else { return "" }
        while last.text.last?.properties.isWhitespace == true { last.text.removeLast() }
        last.end = []
        kept.append(last)
        // white space before the first line is its indentation where another line is indented
        if !kept.dropFirst().contains(where: { !$0.isBlank && $0.text.first?.properties.isWhitespace == true }) {
            kept[0].text = kept[0].text.drop { $0.properties.isWhitespace }
        }
        var found = String.UnicodeScalarView()
        for line in kept { found.append(contentsOf: line.text + line.end) }
        return String(found)
    }

    private static func lines(of text: String) -> [Line] {
        let scalars = Array(text.unicodeScalars)
        var lines: [Line] = []
        var (start, place) = (0, 0)
        while place < scalars.count {
            guard isLineBreak(scalars[place]) else {
                place += 1
                continue
            }
            let isPair = scalars[place] == "\r" && place + 1 < scalars.count && scalars[place + 1] == "\n"
            let next = place + (isPair ? 2 : 1)
            lines.append(Line(text: scalars[start..<place], end: Array(scalars[place..<next])))
            (start, place) = (next, next)
        }
        return lines + [Line(text: scalars[start...], end: [])]
    }

    private static func isLineBreak(_ scalar: Unicode.Scalar) -> Bool {
        ["\n", "\u{0B}", "\u{0C}", "\r", "\u{85}", "\u{2028}", "\u{2029}"].contains(scalar)
    }
}
